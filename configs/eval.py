"""Comparisons of methods, `python -m osv_jax.evaluate table`: which are made, on which videos, how they are scored.

`configs/eval.py` is the paper's Table 1 for students of your own, `--config.students='("runs/stage2",)'`;
`configs/eval.py:miniature` compares the small SVD that comes with the package with its student, on a CPU;
`configs/eval.py:tiny` is the same with few steps of one clip.
"""

from ml_collections import ConfigDict

from osv_jax.evaluation.options import TableOptions
from osv_jax.objectives.options import to_config


def get_config(variant: str = "") -> ConfigDict:
    # All keys and what they mean: osv_jax/evaluation/options.py. Changed most often:
    config = ConfigDict(to_config(TableOptions))
    config.weights = "weights/svd"
    config.students = ("runs/stage2",)
    config.videos = "latents/576x1024"  # a folder of videos, or a prepared dataset, of which the split `test` is taken
    config.fvd_weights = "weights/eval"
    config.output = "evaluated"

    if variant in ("miniature", "tiny"):
        config.weights = "miniature"
        config.students = ("miniature/stage2",)
        config.videos = "miniature"
        config.fvd_weights = ""
        config.output = f"runs/{variant}/evaluated"
    elif variant:
        raise ValueError(f"configs/eval.py has the variants '', 'miniature' and 'tiny', not {variant!r}.")
    if variant == "tiny":
        config.students = ()
        config.clips = 1
        config.methods = (
            {"name": "teacher, 2 steps", "sampler": "euler", "steps": 2},
            {"name": "student, 1 step", "lora": "miniature/stage2"},
        )
    return config
