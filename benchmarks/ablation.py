"""The terms of the distillation against one another: the same start, teacher, photographs, steps and seeds.

python -m benchmarks.ablation PHOTOGRAPHS --base BASE --student START --output_dir runs/ablation
python -m benchmarks.ablation PHOTOGRAPHS ... --set_root SETS      # measures the students on RealSR as well
python -m benchmarks.ablation --tables                             # of what was found
python -m benchmarks.ablation --curves CURVES.png                  # the losses of all runs (needs matplotlib)
python -m benchmarks.ablation PHOTOGRAPHS ... --crops CROPS.jpg    # pictures of the runs that are there

Every run continues the student START (a pipeline that was trained with reconstruction alone) with the recipe
`ablation.yaml` and the flags of its row. Runs that are finished are not run again, and one that was stopped goes on.
"""

from tsdsr.benchmarks.comparison import Comparison

ABLATION = Comparison(
    "ablation",
    __doc__ or "",
    # lambda = vsd_weight mixes VSD (1) and TSM (0) (equation 5).
    {
        "reconstruction": {"tsd": 0},
        "VSD": {"vsd_weight": 1, "dasm_steps": 1},
        "TSM": {"vsd_weight": 0, "dasm_steps": 1},
        "TSD without DASM": {"dasm_steps": 1},
        "TSD": {},
    },
    ("pixel_l1", "latent_mse", "tsd", "fake_score"),
)

if __name__ == "__main__":
    ABLATION.main()
