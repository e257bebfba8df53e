"""Reading untrusted checkpoints, building encoders, tapping their layers, exporting them."""
