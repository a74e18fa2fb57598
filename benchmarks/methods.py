"""Methods of distillation against one another: the same photographs, teacher, start, steps and seeds.

python -m benchmarks.methods PHOTOGRAPHS --base BASE --student START --output_dir runs/methods
python -m benchmarks.methods PHOTOGRAPHS ... --set_root SETS      # measures the students on RealSR as well
python -m benchmarks.methods --tables                             # of what was found
python -m benchmarks.methods --curves CURVES.png                  # the losses of all runs (needs matplotlib)
python -m benchmarks.methods PHOTOGRAPHS ... --crops CROPS.jpg    # pictures of the runs that are there

Every run takes the recipe `methods.yaml` and the flags of its row. All have the recipe's reconstruction terms on
pictures beside their own, with the published weights: VSD and TSD-SR the MSE to the photograph's latents, the rows of
TAD-SR (those of its table 1) the regression to the teacher's result. A BASE that restores LQ pictures takes no START:
its students begin as the base. Runs that are finished are not run again, and one that was stopped goes on.
"""

from tsdsr.benchmarks.comparison import Comparison

METHODS = Comparison(
    "methods",
    __doc__ or "",
    {
        "VSD (OSEDiff)": {"objective": "vsd"},
        "TSD-SR": {"objective": "tsd"},
        "SDS": {"objective": "tad", "hsd_target": "none", "latent_adversarial": 0},
        "HSD": {"objective": "tad", "latent_adversarial": 0},
        "HSD + D": {"objective": "tad", "time_aware": False},
        "HSD + time-aware D (TAD-SR)": {"objective": "tad"},
    },
    ("pixel_l1", "teacher_mse", "hsd", "latent_discriminator", "tsd", "fake_score"),
)

if __name__ == "__main__":
    METHODS.main()
