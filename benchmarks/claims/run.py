"""Trains what the claims of the paper are judged by; `report.py` judges them.

    python benchmarks/claims/run.py --data_dir /usr/share/datasets/fashion-mnist
    python benchmarks/claims/run.py --setting held_out --data_dir /usr/share/datasets/fashion-mnist
    python benchmarks/claims/run.py --setting cifar10_lt --data_dir DIR --jobs 1 --threads 16

Every run is a process of its own and leaves a record in `benchmarks/claims/results/`; what is recorded is not run
again, so that a series can be stopped at any time and goes on where it was. Two runs on one thread each take less than
one after the other on two.
"""

import argparse
from concurrent.futures import Future, ThreadPoolExecutor

from arms import SETTINGS, Runs, hold_out


def submit(pool: ThreadPoolExecutor, runs: Runs, seed: int, wanted: list[str] | None) -> dict[str, Future]:
    """Plans a seed: first the teachers that are needed, or of all arms those without a record; then the students."""
    setting = runs.setting
    todo = [name for name in wanted or setting.students if not runs.record(seed, name).exists()]
    needed = {setting.students[name].teacher for name in todo}
    if wanted is None:
        needed |= {name for name in setting.teachers if not runs.record(seed, name).exists()}
    teachers = {name: pool.submit(tell, runs.teach, seed, name) for name in setting.teachers if name in needed}

    def study(name: str) -> None:
        teacher = setting.students[name].teacher
        if teacher is not None:
            teachers[teacher].result()  # which began before, so that it ends
        tell(runs.study, seed, name)

    return teachers | {name: pool.submit(study, name) for name in todo}


def tell(work, seed: int, name: str) -> None:
    print(f"seed {seed}: {name}\n", end="", flush=True)
    work(seed, name)
    print(f"seed {seed}: {name} is done\n", end="", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="fashion", choices=list(SETTINGS))
    parser.add_argument("--data_dir", help="folder of the images; by default they come from the Hub")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the setting's")
    parser.add_argument("--students", nargs="+", help="instead of all of the setting's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run; its numbers depend on them")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    unknown = sorted(set(args.students or ()) - set(setting.students))
    if unknown:
        parser.error(f"unknown students {', '.join(unknown)}; {args.setting} has {', '.join(setting.students)}.")
    if setting.holds_out and args.data_dir is None:
        parser.error(f"--setting {args.setting} needs --data_dir with the four IDX files.")
    data_dir = str(hold_out(args.data_dir)) if setting.holds_out else args.data_dir
    runs = Runs(args.setting, data_dir, args.threads)
    with ThreadPoolExecutor(args.jobs) as pool:
        plans = {
            (seed, name): plan
            for seed in args.seeds or setting.seeds
            for name, plan in submit(pool, runs, seed, args.students).items()
        }
    failed = {key: plan.exception() for key, plan in plans.items() if plan.exception() is not None}
    for (seed, name), error in failed.items():
        print(f"seed {seed}: {name} failed: {error}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
