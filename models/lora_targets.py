"""Layers of SD3's transformer that TSD-SR's LoRAs are on, matched by the last parts of their names.

Source: the release `Microtreei/TSD-SR`, train/train.py.
"""

FAKE_SCORE = ("to_k", "to_q", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
STUDENT = (*FAKE_SCORE, "proj", "linear", "proj_out")
