// Augmented and plain views of uint8 images on the CPU: what data/augment.py computes, image by image.
//
// A view is made line by line: resized, changed and stored while it is in the cache; where contrast
// needs the mean of the whole image, the image waits in the second-level cache. One image is one
// task of one thread and depends on nothing else: results are the same bits at any place in any
// batch, for any number of threads. -DPORTABLE leaves the vector instructions out.

#include <cstdint>
#include <vector>

#include "cpu_views_colors.h"
#include "cpu_views_resize.h"

namespace {

// Float images: planes one after the other, or the channels of each pixel together.
struct Images {
  float* start;
  int64_t count, channels, height, width;
  int32_t interleaved;

  float* image(int64_t b) const { return start + b * channels * height * width; }
  // A single channel lies the same way in both.
  bool mixed() const { return interleaved && channels > 1; }
};

// Strides of uint8 images, in bytes.
struct Pixels {
  const uint8_t* start;
  int64_t image, channel, line, pixel;
};

// Where the lines of an image are kept while it is worked on.
struct Workplace {
  float* start;
  int64_t channels, width, line_stride, channel_stride;
  Line operator()(int64_t y) const {
    return {start + y * line_stride, channels, channel_stride, width};
  }
};

// In the image itself where it has planes, else in scratch: all of it if contrast needs it again.
Workplace workplace(const Images& images, int64_t b, int64_t passes, std::vector<float>& scratch) {
  const int64_t C = images.channels, H = images.height, W = images.width;
  if (!images.mixed()) return {images.image(b), C, W, W, H * W};
  scratch.resize(passes > 1 ? H * W * C : W * C);
  return {scratch.data(), C, W, passes > 1 ? W * C : 0, W};
}

template <int64_t C>
void interleave(const Line& line, float* __restrict to) {
#pragma omp simd
  for (int64_t x = 0; x < line.length; ++x)
    for (int64_t c = 0; c < C; ++c) to[C * x + c] = line.start[c * line.stride + x];
}

template <int64_t C>
void separate(const float* __restrict from, const Line& line) {
#pragma omp simd
  for (int64_t x = 0; x < line.length; ++x)
    for (int64_t c = 0; c < C; ++c) line.start[c * line.stride + x] = from[C * x + c];
}

// Makes one image: `read` gives its lines, colors change, and they end up where they belong.
template <typename Read>
void make_image(const Images& images, int64_t b, const Changes& changes,
                std::vector<float>& scratch, Read read) {
  const Workplace place = workplace(images, b, changes.passes(), scratch);
  const auto write = [&](int64_t y, const Line& line) {
    if (images.mixed()) interleave<3>(line, images.image(b) + y * images.width * 3);
  };
  make_changes(changes, images.height, place, read, write);
}

void divide(const uint8_t* from, int64_t stride, int64_t length, float* __restrict to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t x = 0; x < length; ++x) to[x] = from[x] / 255.0f;
  } else {
    for (int64_t x = 0; x < length; ++x) to[x] = from[x * stride] / 255.0f;
  }
}

}  // namespace

// `threads` is at least 1, and of use only up to the number of images.
extern "C" {

// Crops of the images `rows` of a dense pool [.., channels, side, side], resized, with colors.
void views(const uint8_t* pool, int64_t side, const int64_t* rows, const float* boxes,
           const uint8_t* flips, const Drawn* drawn, const Images* out, int64_t threads) {
  const int64_t image_bytes = out->channels * side * side;
#pragma omp parallel num_threads(threads)
  {
    Resizer resizer(out->channels, side, out->width);
    std::vector<float> scratch;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < out->count; ++b) {
      resizer.begin(pool + rows[b] * image_bytes, boxes + 4 * b, flips[b]);
      make_image(*out, b, Changes(drawn, b, out->channels), scratch,
                 [&](int64_t y, const Line& line) { resizer.line(y, line.start, line.stride); });
    }
  }
}

// Images [0, 255] become [0, 1], to the bit of a division by 255, with colors if `drawn` is given.
// `rows` may be null: the images in their order.
void convert(const Pixels* pixels, const int64_t* rows, const Drawn* drawn, const Images* out,
             int64_t threads) {
  // Without colors the planes have nothing to do with each other: one after the other, written in
  // one go, takes half the time.
  const int64_t parts = drawn || out->interleaved ? 1 : out->channels;
  const Images images{out->start,  out->count * parts, out->channels / parts,
                      out->height, out->width,         out->interleaved};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < images.count; ++b) {
      const int64_t row = rows ? rows[b / parts] : b / parts;
      const uint8_t* image = pixels->start + row * pixels->image + b % parts * pixels->channel;
      make_image(images, b, Changes(drawn, b, images.channels), scratch,
                 [&](int64_t y, const Line& line) {
                   for (int64_t c = 0; c < line.channels; ++c)
                     divide(image + c * pixels->channel + y * pixels->line, pixels->pixel,
                            line.length, line.channel(c));
                 });
    }
  }
}

// The colors of images in [0, 1], in place.
void colors(const Drawn* drawn, const Images* images, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < images->count; ++b) {
      const Changes changes(drawn, b, images->channels);
      if (!changes.some()) continue;
      make_image(*images, b, changes, scratch, [&](int64_t y, const Line& line) {
        if (images->mixed()) separate<3>(images->image(b) + y * images->width * 3, line);
      });
    }
  }
}
}
