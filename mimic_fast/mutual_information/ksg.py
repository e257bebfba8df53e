"""Mutual information from distances to nearest neighbors, without bins.

Kraskov, Stoegbauer and Grassberger, "Estimating mutual information", Phys. Rev. E 69, 066138
(2004), eq. (8): I = psi(k) + psi(n) - mean of psi(n_x + 1) + psi(n_y + 1), where n_x and n_y count
the images that are nearer on one side alone than the k-th neighbor on both, maximum norm. It sees
any dependence between the two vectors, also what no pair of directions shows. Its bias falls with
n and grows with the dimension and the information, mostly downward; no value exceeds
psi(n) - psi(k).
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

NEIGHBORS = 3
_DISTANCES = 4_000_000  # held at once for each side; 32 MB


def ksg_terms(
    x: Float64[Tensor, "image x_dim"],
    y: Float64[Tensor, "image y_dim"],
    *,
    neighbors: int = NEIGHBORS,
) -> Float64[Tensor, " image"]:
    """What each image adds to the estimate, which is their mean; single terms may be negative.

    Raises:
        ValueError: If there are not more images than neighbors.
    """
    counts = neighbor_counts(x, y, neighbors=neighbors)
    sizes = torch.tensor([neighbors, len(x)], dtype=torch.float64)
    return sizes.digamma().sum() - (counts + 1).double().digamma().sum(dim=0)


def neighbor_counts(
    x: Float64[Tensor, "image x_dim"], y: Float64[Tensor, "image y_dim"], *, neighbors: int
) -> Int64[Tensor, "side image"]:
    """n_x and n_y of every image: others strictly nearer on that side than its k-th joint neighbor.

    Raises:
        ValueError: If there are not more images than neighbors.
    """
    images = len(x)
    if not 1 <= neighbors < images:
        raise ValueError(
            f"expected 1 <= neighbors < images, got {neighbors} neighbors of {images} images"
        )
    found = []
    for rows in torch.arange(images).split(max(1, _DISTANCES // images)):
        of_x = torch.cdist(x[rows], x, p=torch.inf)
        of_y = torch.cdist(y[rows], y, p=torch.inf)
        joint = torch.maximum(of_x, of_y)
        joint[torch.arange(len(rows)), rows] = torch.inf  # no image is its own neighbor
        reach = joint.topk(neighbors, largest=False).values[:, -1:]
        # The image itself is nearer than its neighbors, unless these lie on it.
        own = (reach[:, 0] > 0).long()
        found.append(torch.stack([(d < reach).sum(dim=1) - own for d in (of_x, of_y)]))
    return torch.cat(found, dim=1)
