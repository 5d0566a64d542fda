"""Trains the models that judge the claims of the paper; `report.py` judges them.

    python research/run.py --data_dir /usr/share/datasets/fashion-mnist
    python research/run.py --setting held_out --data_dir /usr/share/datasets/fashion-mnist
    python research/run.py --setting fashion_long --data_dir DIR --arms deit-lt labels ours --jobs 3
    python research/run.py --setting cifar10_lt_rho100 --data_dir DIR --jobs 1 --threads 16

Every run is a separate process and writes a record to `research/results/`. Recorded runs are not repeated: a series
can be stopped at any time and continues from there. Two simultaneous runs on one thread each take less time than one
after the other on two threads.
"""

import argparse
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from arms import LABELS, SETTINGS, Runs, hold_out


def submit(pool: ThreadPoolExecutor, runs: Runs, seed: int, names: list[str]) -> dict[str, Future]:
    """Plans the runs of one seed: first the required teachers, then the students that have no record."""
    setting = runs.setting
    todo = [name for name in names if runs.recorded(seed, name) is None]
    needed = {setting.students[name].teacher for name in todo if name in setting.students} - {None}
    all_teachers = set(setting.teachers)
    is_due = all_teachers & set(todo) or not runs.record(seed, LABELS).exists()
    compares = is_due and all_teachers <= set(names) and not setting.holds_out
    if compares:
        needed |= all_teachers
    teachers = {
        name: pool.submit(tell, runs.teach, seed, name)
        for name in (*setting.teachers, *(needed - set(setting.teachers)))
        if name in needed or name in todo
    }

    def compare() -> None:
        for teacher in teachers.values():
            teacher.result()  # it was submitted earlier, and therefore ends
        tell(lambda seed, _: runs.compare_teachers(seed), seed, LABELS)

    def study(name: str) -> None:
        teacher = setting.students[name].teacher
        if teacher is not None:
            teachers[teacher].result()
        tell(runs.study, seed, name)

    compared = {LABELS: pool.submit(compare)} if compares else {}
    students = [name for name in todo if name in setting.students and name not in teachers]
    return teachers | compared | {name: pool.submit(study, name) for name in students}


def plan(pool: ThreadPoolExecutor, runs: Runs, seeds: list[int], names: list[str]) -> dict[tuple[int, str], Future]:
    """Plans all runs; the later students come after the others of all seeds."""
    later = [name for name in names if name in runs.setting.later]
    first = [name for name in names if name not in later]
    return {
        (seed, name): future
        for some in (first, later)
        for seed in seeds
        for name, future in submit(pool, runs, seed, some).items()
    }


def tell(work, seed: int, name: str) -> None:
    print(f"seed {seed}: {name}\n", end="", flush=True)
    work(seed, name)
    print(f"seed {seed}: {name} is done\n", end="", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="fashion", choices=list(SETTINGS))
    parser.add_argument("--data_dir", help="folder of the images; by default they come from the Hub")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds instead of the setting's")
    parser.add_argument("--arms", nargs="+", help="teachers and students instead of all of the setting")
    parser.add_argument("--jobs", type=int, default=2, help="number of simultaneous runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run, which affect the results")
    parser.add_argument("--results", type=Path, help="folder of the records instead of research/results")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    arms = [*setting.teachers, *setting.students]
    unknown = sorted(set(args.arms or ()) - set(arms))
    if unknown:
        parser.error(f"unknown arms {', '.join(unknown)}; {args.setting} has {', '.join(arms)}.")
    if setting.holds_out and args.data_dir is None:
        parser.error(f"--setting {args.setting} needs --data_dir with the four IDX files.")
    data_dir = str(hold_out(args.data_dir)) if setting.holds_out else args.data_dir
    runs = Runs(args.setting, data_dir, args.threads, args.results)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = plan(pool, runs, args.seeds or list(setting.seeds), args.arms or arms)
            wait(futures.values())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # otherwise it would start the queued runs
            raise
    failed = {key: future.exception() for key, future in futures.items() if future.exception() is not None}
    for (seed, name), error in failed.items():
        print(f"seed {seed}: {name} failed: {error}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
