"""Layers of a base that TSD-SR's LoRAs are on, matched by the last parts of their names.

Source of SD3's: the release `Microtreei/TSD-SR`, train/train.py. It has none for UNets.
"""

FAKE_SCORE = ("to_k", "to_q", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
STUDENT = (*FAKE_SCORE, "proj", "linear", "proj_out")
# Of SD2's UNets: all attention, feed-forward and convolution layers for the student.
UNET_FAKE_SCORE = ("to_k", "to_q", "to_v", "to_out.0")
UNET_STUDENT = (
    *UNET_FAKE_SCORE,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv_in",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_out",
)
