"""Methods of distillation against one another: the same photographs, teacher, start, steps and seeds.

python -m benchmarks.methods PHOTOGRAPHS --base BASE --student START --output_dir runs/methods
python -m benchmarks.methods PHOTOGRAPHS ... --set_root SETS      # measures the students on RealSR as well
python -m benchmarks.methods --tables                             # of what was found
python -m benchmarks.methods --curves CURVES.png                  # the losses of all runs (needs matplotlib)
python -m benchmarks.methods PHOTOGRAPHS ... --crops CROPS.jpg    # pictures of the runs that are there

Every run takes the recipe `methods.yaml` and the flags of its row. All have the recipe's reconstruction terms on
pictures beside their own; those of TAD-SR (the rows of its table 1) have its regression to the teacher's result as
well. A BASE that restores LQ pictures takes no START: its students begin as the base. Runs that are finished are not
run again, and one that was stopped goes on.
"""

from tsdsr.benchmarks.comparison import Comparison

# Of equal weight, as in `ablation`; pictures are compared, so that latents need not be.
SCORES = {"tsd": 2, "latent_mse": 0}
METHODS = Comparison(
    "methods",
    __doc__ or "",
    {
        "VSD (OSEDiff)": {"objective": "vsd", **SCORES},
        "TSD-SR": {"objective": "tsd", **SCORES},
        "SDS": {"objective": "tad", "hsd_target": "none", "latent_adversarial": 0},
        "HSD": {"objective": "tad", "latent_adversarial": 0},
        "HSD + D": {"objective": "tad", "time_aware": False},
        "HSD + time-aware D (TAD-SR)": {"objective": "tad"},
    },
    ("pixel_l1", "teacher_mse", "hsd", "latent_discriminator", "tsd", "fake_score"),
)

if __name__ == "__main__":
    METHODS.main()
