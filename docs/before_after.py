"""Makes the picture at the top of the README: left the small photograph enlarged by bicubic interpolation, right ours.

python docs/before_after.py docs/images/flower.jpg docs/images/before_after.jpg
"""

import sys

import numpy as np
from PIL import Image

from tsdsr import load_pipeline

source, target = sys.argv[1:]
photograph = Image.open(source).convert("RGB")
after = load_pipeline("embedded")(photograph, upscale=4).images[0]
before = photograph.resize(after.size, Image.Resampling.BICUBIC)
gap = np.full((after.height, 8, 3), 255, np.uint8)
Image.fromarray(np.concatenate([np.asarray(before), gap, np.asarray(after)], axis=1)).save(target, quality=92)
