"""Stand-in weights for the comparison detectors: seeded_weights.py's rules plus rules for the heads of ATSS, PAA, GFL, FCOS, VFNet, RetinaNet.

    fill(shapes, method, salt="") -> {key: numpy array}

`method` is one of atss, paa, gfl, fcos, vfnet, retina. `salt` is put before every key when its random stream is chosen
("" for goldens_family). Keys are MMDetection 3.x's own; the draw of a key depends on salt, key and shape, as in
seeded_weights.py; RULES below only say which spread. numpy only.

Two kinds of tensors are not drawn: `num_batches_tracked` (0) and GFL's `bbox_head.integral.project` (0, 1, .., 16).
"""
import math

import numpy as np
from . import seeded_weights as sw

# as in seeded_weights._HEAD: ("gain", g): std g / sqrt(fan in); ("std", s, mean)
RULES = {
    "atss": {"atss_cls.weight": ("gain", 1.5), "atss_cls.bias": ("std", 1.2, -6.5),
             "atss_reg.weight": ("gain", 1.0), "atss_reg.bias": ("std", 0.5, 0.0),
             "atss_centerness.weight": ("gain", 1.4), "atss_centerness.bias": ("std", 0.0, 0.5)},
    "gfl": {"gfl_cls.weight": ("gain", 1.5), "gfl_cls.bias": ("std", 1.2, -6.5),
            "gfl_reg.weight": ("gain", 2.0), "gfl_reg.bias": ("std", 1.0, 0.0)},
    "fcos": {"conv_cls.weight": ("gain", 1.5), "conv_cls.bias": ("std", 1.2, -6.5),
             "conv_reg.weight": ("gain", 1.0), "conv_reg.bias": ("std", 0.3, 3.0),
             "conv_centerness.weight": ("gain", 1.4), "conv_centerness.bias": ("std", 0.0, 0.5)},
    "vfnet": {"vfnet_cls.weight": ("gain", 1.5), "vfnet_cls.bias": ("std", 1.2, -6.5),
              "vfnet_reg.weight": ("gain", 0.35), "vfnet_reg.bias": ("std", 0.1, -0.8),
              "vfnet_reg_refine.weight": ("gain", 0.3), "vfnet_reg_refine.bias": ("std", 0.05, 0.0)},
    "retina": {"retina_cls.weight": ("gain", 0.5), "retina_cls.bias": ("std", 1.2, -6.5),
               "retina_reg.weight": ("gain", 0.3), "retina_reg.bias": ("std", 0.1, 0.0)},
}
RULES["paa"] = dict(RULES["atss"], **{"atss_cls.bias": ("std", 1.2, -8.5)})


_cache = {}


def fill(shapes, method, salt=""):
    plain = sw._uniform
    sw._uniform = lambda key, *a: plain(salt + key, *a)
    try:
        out = {}
        for key, shape in shapes.items():
            shape = tuple(int(s) for s in shape)
            rule = next((r for tail, r in RULES[method].items() if key == "bbox_head." + tail), None)
            memo = (salt, key, shape, rule)
            if memo in _cache:
                out[key] = _cache[memo]
            elif key == "bbox_head.integral.project":
                out[key] = np.arange(shape[0], dtype=np.float32)
            elif rule and rule[0] == "gain":
                out[key] = sw._spread(key, shape, rule[1] / math.sqrt(sw._fan_in(shape)))
            elif rule:
                out[key] = sw._spread(key, shape, rule[1], rule[2])
            else:
                out[key] = sw.one(key, shape)
            _cache[memo] = out[key]
        return out
    finally:
        sw._uniform = plain
