from mimic_fast.config import DataSettings, Settings
from mimic_fast.evidence import scan_settings


def test_a_scan_reads_images_within_the_limits_of_the_purification(tmp_path):
    data = DataSettings(source="images", max_item_mb=3, max_megapixels=2, workers=3)
    settings = Settings.model_validate({"data": data})

    made = scan_settings(settings, settings.encoder, tmp_path)

    assert made.data == DataSettings(source="images", max_item_mb=3, max_megapixels=2)
    assert made.run.out == tmp_path
