"""Wrong command lines, wrong or damaged run directories, and machines that let us down."""

from pathlib import Path

from tests.bad_input.builders import (
    FEW_SHOT,
    GOOD,
    RUN,
    Place,
    Prepare,
    command,
    cut,
    evaluate,
    flip,
    one_checkpoint,
    other_fingerprint,
    pool,
    remove,
    replace,
    resume,
    run,
    sets,
    train,
    used_run,
    vectors,
)

STEP_2 = f"{RUN}/checkpoints/step_00000002"
NEWEST = "checkpoints/step_00000002"
CHECKPOINT_FILES = (
    "theta.safetensors",
    "statistics.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
NONE_INTACT = f"{RUN}/checkpoints: none of 1 checkpoints is intact. Restore one, or start another run directory."


def trained_then(*assignments: str, then: list[str], config: str = GOOD) -> Prepare:
    """A run directory made with these settings, and what is done with it."""

    def prepare(place: Place) -> list[str]:
        command(config=config)(place)
        outcome = run(resume(*sets(assignments)))
        assert outcome.status == 0, outcome.said
        return then

    return prepare


def of_another_pool(place: Place) -> list[str]:
    """A class pool whose content changed under the same name."""
    arguments = resume("--set", "training.steps=3")
    pool()(place)
    trained_then(then=arguments, config=FEW_SHOT)(place)
    place.pool(vectors(spoil={row: [float(-row), 2.0, 7.0] for row in range(9)}))
    return arguments


def config_within(place: Place) -> list[str]:
    """A config of the user's own where the run's resolved one would come to lie."""
    (place.path / "runs/x").mkdir(parents=True)
    place.write(GOOD, "runs/x/config.yaml")
    return ["train", "runs/x/config.yaml", "--run-dir", "runs/x", "--workers", "0"]


def below_a_file(place: Place) -> list[str]:
    place.write("not a directory", "runs")
    return command(*train("--run-dir", "runs/x"))(place)


def without_checkpoints(place: Place) -> list[str]:
    return used_run(remove("checkpoints"), then=evaluate())(place)


def empty_directory(place: Place) -> list[str]:
    (place.path / RUN).mkdir(parents=True)
    return evaluate()


def empty_directory_report(place: Place) -> list[str]:
    (place.path / RUN).mkdir(parents=True)
    return ["report", RUN]


def other_files(place: Place) -> list[str]:
    place.write("text", "notes.txt")
    return ["evaluate", "notes.txt", "--workers", "0"]


def shots_above_a_class(place: Place) -> list[str]:
    place.pool()
    return trained_then(then=evaluate("--shots", "2,3"), config=FEW_SHOT)(place)


def compare(*arguments: str) -> list[str]:
    return ["compare", *arguments, "--workers", "0"]


def on_cluster(*address: str) -> Prepare:
    return command("train", "bad.yaml", "--workers", "1", "--address", *address)


def submitted(*address: str, run_dir: str = "s3://bucket/x", config: str = GOOD) -> Prepare:
    return command("submit", "bad.yaml", "--run-dir", run_dir, *address, config=config)


WRONG_COMMANDS: dict[str, tuple[Prepare, str]] = {
    "job with a relative run directory": (
        submitted(run_dir="runs/x"),
        "run.storage_path must be absolute or a URI for a job, got 'runs' ... --run-dir s3://BUCKET/NAME",
    ),
    "job with a relative pool": (
        submitted(config=FEW_SHOT),
        "task.pool must be absolute or a URI for a job, got 'pool.parquet' ... --set task.pool=s3://BUCKET/pool.parquet",
    ),
    "job with a config from elsewhere": (
        command("submit", str(Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"), "--run-dir", "/x/y"),
        "CONFIG must lie in this directory ... sinusoid_maml.yaml' ... your project's directory",
    ),
    "job without an address": (submitted(), "--address must be given ... http://HEAD:8265"),
    "job at the head's own port": (
        submitted("--address", "10.0.0.1:6379"),
        "--address must be that of the cluster's dashboard ... got '10.0.0.1:6379' ... `metadist train --address`",
    ),
    "job at an impossible port": (submitted("--address", "http://a:99999"), "got 'http://a:99999'"),
    "job with a password in the address": (
        submitted("--address", "http://me:secret@10.0.0.1:8265"),
        "--address must not hold a user or a password ... RAY_AUTH_TOKEN_PATH",
    ),
    "job where nothing answers": (
        submitted("--address", "http://127.0.0.1:1"),
        "--address: nothing answers at http://127.0.0.1:1 ... refused ... `ray start --head`",
    ),
    "workers that are no number": (
        command("train", "bad.yaml", "--workers", "two"),
        "--workers ... 'two' ... --workers 2",
    ),
    "workers from 0": (command("train", "bad.yaml", "--workers", "0:2"), "--workers ... 1 <= MIN <= MAX, got '0:2'"),
    "workers to fewer": (command("train", "bad.yaml", "--workers", "3:1"), "--workers ... got '3:1' ... --workers 1:4"),
    "--resume of another word": (
        command(*train("--resume", "yes")),
        "--resume ... 'yes' is not one of 'auto', 'never'",
    ),
    "run directory without a name": (
        command(*train("--run-dir", "")),
        "--run-dir must end in the run's own name, got ''",
    ),
    "run directory above": (
        command(*train("--run-dir", "a/..")),
        "--run-dir must end in the run's own name, got 'a/..'",
    ),
    "run directory of no kind": (command(*train("--run-dir", "foo://a/b")), "foo://a/b: not a place ... s3://BUCKET"),
    "home of nobody": (command(*train("--run-dir", "~nobody-0/x")), "~nobody-0/x ... no such user ... in full"),
    "run directory below a file": (
        below_a_file,
        "runs/x: the run directory cannot be made (Not a ... another --run-dir",
    ),
    "run directory that holds the config": (
        config_within,
        "runs/x holds a config.yaml that would be written over ... Choose another --run-dir",
    ),
    "--resume must without a run": (
        command(*resume("--resume", "must")),
        f"{RUN} holds no checkpoint to go on from ... use --resume auto.",
    ),
    "--resume never with a run": (
        used_run(then=resume("--resume", "never")),
        f"{RUN} holds a run with checkpoints ... Choose another --run-dir, or --resume auto.",
    ),
    "run of another config": (
        used_run(then=resume("--set", "algorithm.inner_lr=0.02")),
        f"{RUN} holds a run of another config: algorithm.inner_lr: 0.01 there, 0.02 here. Choose another --run-dir",
    ),
    "run of another model": (
        used_run(then=resume("--set", "model.hidden=[5]")),
        "another config: model.hidden: [4] there, [5] here. ... use that run's config.",
    ),
    "run that is further": (
        used_run(then=resume("--set", "training.steps=1")),
        "is already at step 2, beyond training.steps = 1. Raise training.steps",
    ),
    "evaluating nothing": (command(*evaluate()), f"{RUN} is no run directory ... Give the directory that"),
    "evaluating an empty directory": (empty_directory, f"{RUN} is no run directory: it holds no config.yaml. Give the"),
    "evaluating a file": (other_files, "notes.txt is no run directory ... Give the directory that `metadist train`"),
    "evaluating without checkpoints": (without_checkpoints, f"{RUN} holds no checkpoint yet. Train it further."),
    "evaluating a step that is not there": (
        used_run(then=evaluate("--step", "7")),
        f"{RUN} has no checkpoint of step 7; it has 1, 2. Choose one.",
    ),
    "evaluating an unknown split": (
        used_run(then=evaluate("--split", "dev")),
        "--split ... 'dev' is not one of 'train', 'val', 'test'",
    ),
    "evaluating no episodes": (used_run(then=evaluate("--episodes", "0")), "--episodes ... 0 is not in the range x>=1"),
    "evaluating a seed too large": (used_run(then=evaluate("--seed", str(2**63))), f"--seed ... {2**63} is not in"),
    "shots of 0": (used_run(then=evaluate("--shots", "0")), "--shots ... numbers of at least 1 ... got '0'. Such as"),
    "shots that are no numbers": (
        used_run(then=evaluate("--shots", "1,two")),
        "--shots ... numbers of at least 1 with commas between, got '1,two'. Such as: 1,5,10",
    ),
    "shots of nothing": (used_run(then=evaluate("--shots", "")), "--shots ... numbers of at least 1 ... got ''"),
    "shots above a class": (
        shots_above_a_class,
        "pool.parquet: class 'a' (train) has 3 examples, and task.shots + task.queries = 3 + 1 = 4 ... Lower them",
    ),
    "comparing nothing": (command(*compare()), "Missing argument 'CONFIG_OR_RUN...'"),
    "comparing what is not there": (
        command(*compare("bad.yaml", "nope.yaml")),
        "nope.yaml: there is neither a config file nor a run directory. Give the path of a YAML file, or the",
    ),
    "comparing a directory that is no run": (
        command(*compare("bad.yaml", ".")),
        ". is no run directory: it holds no config.yaml. Give the directory",
    ),
    "comparing with a run without checkpoints": (
        used_run(remove("checkpoints"), then=compare("bad.yaml", RUN)),
        f"{RUN} holds no checkpoint yet. Train it further.",
    ),
    "comparing a config whose directory holds another run": (
        used_run(then=compare(RUN, "bad.yaml", "--set", f"run.name={RUN[5:]}", "--set", "outer.lr=0.5")),
        f"{RUN} holds a run of another config: outer.lr: 0.001 there, 0.5 here. Choose another",
    ),
    "comparing on other episodes": (
        used_run(then=compare(RUN, "bad.yaml", "--set", "task.shots=4")),
        f"bad.yaml has other episodes than {RUN} ... can be compared: task.shots: 3 there, 4 here. Make them equal",
    ),
    "comparing with a wrong key": (
        used_run(then=compare(RUN, "bad.yaml", "--set", "task.shot=4")),
        "task.shot ... (--set) ... shots",
    ),
    "comparing runs alone with --set": (
        used_run(then=compare(RUN, RUN, "--set", "training.steps=3")),
        "--set applies to config files, and none is given: run directories are taken as they are.",
    ),
    "comparing no episodes": (
        used_run(then=compare(RUN, "--episodes", "0")),
        "--episodes ... 0 is not in the range x>=1",
    ),
    "comparing into a file of another kind": (
        used_run(then=compare(RUN, "--out", "compare.txt")),
        "--out ... must be a file name ending in .json, got 'compare.txt'. Such as",
    ),
    "address without a port": (on_cluster("127.0.0.1"), "scaling.address must be HOST:PORT ... got '127.0.0.1'"),
    "address of a dashboard": (
        on_cluster("http://127.0.0.1:8265"),
        "scaling.address must be HOST:PORT ... got 'http://127.0.0.1:8265' ... ray job submit",
    ),
    "address where nothing answers": (
        on_cluster("127.0.0.1:1"),
        "scaling.address: nothing answers at '127.0.0.1:1' ... Check the address",
    ),
}

DAMAGED_RUNS: dict[str, tuple[Prepare, str]] = {
    "config of the run lost": (
        used_run(remove("config.yaml"), then=resume()),
        f"{RUN}/config.yaml is missing, damaged or of another version ... Restore it, or choose another --run-dir.",
    ),
    "config of the run torn": (
        used_run(replace("config.yaml", b"task: {name: sin"), then=resume()),
        f"{RUN}/config.yaml is missing, damaged or of another version ... Restore it",
    ),
    "config of the run a list": (
        used_run(replace("config.yaml", b"- 1"), then=resume()),
        f"{RUN}/config.yaml is missing, damaged or of another version ... Restore it",
    ),
    "evaluating with a torn config": (
        used_run(replace("config.yaml", b"task: {name: sin"), then=evaluate()),
        f"{RUN}/config.yaml, line 1: not valid YAML",
    ),
    "evaluating with a binary config": (
        used_run(replace("config.yaml", b"\xff\xfe\x00"), then=evaluate()),
        f"{RUN}/config.yaml is damaged: it is no text. Restore it.",
    ),
    "reporting on no run": (
        empty_directory_report,
        f"{RUN} is no run directory: it holds no config.yaml. Give the directory that `metadist train` printed.",
    ),
    "reporting on a torn evaluation": (
        used_run(lambda directory: (directory / "evaluation.json").write_text('{"split": "te'), then=["report", RUN]),
        f"{RUN}/evaluation.json: not valid JSON",
    ),
    "reporting on an evaluation that is a list": (
        used_run(lambda directory: (directory / "evaluation.json").write_text("[1]"), then=["report", RUN]),
        f"{RUN}/evaluation.json: must hold a JSON object. Restore or remove it.",
    ),
    "reporting on a step without checkpoint": (
        used_run(then=["report", RUN, "--step", "7"]),
        f"{RUN} has no checkpoint of step 7; it has 1, 2. Choose one.",
    ),
    "fingerprint lost": (
        used_run(remove("fingerprint.json"), then=resume()),
        f"{RUN}/fingerprint.json is missing or damaged ... --allow-numeric-drift",
    ),
    "fingerprint torn": (
        used_run(replace("fingerprint.json", b'{"torch": "2'), then=resume()),
        f"{RUN}/fingerprint.json is missing or damaged ... --allow-numeric-drift",
    ),
    "fingerprint a list": (
        used_run(replace("fingerprint.json", b"[1]"), then=resume()),
        f"{RUN}/fingerprint.json is missing or damaged ... --allow-numeric-drift",
    ),
    "file in the place of all checkpoints": (
        used_run(replace("checkpoints", b""), then=resume()),
        f"{RUN}/checkpoints: not readable (Not a directory)",
    ),
}

FAILURES: dict[str, tuple[Prepare, str]] = {
    "fingerprint of another machine": (
        used_run(other_fingerprint, then=resume("--set", "training.steps=3")),
        "torch '1.0.0' there ... resume with --allow-numeric-drift",
    ),
    "pool of other content": (of_another_pool, "canonical_gradient"),
    "diverging from the first step": (
        command(*train("--set", "algorithm.inner_lr=1e30")),
        "step 0, chunk 0, task source Sinusoid, task train/seed=0/step=0/task=0: query loss is inf. Lower",
    ),
    "diverging later": (
        trained_then(
            "outer.lr=1e18",
            "outer.optimizer=sgd",
            "training.steps=1",
            then=resume("--set", "outer.lr=1e18", "--set", "outer.optimizer=sgd", "--set", "evaluation.every=1"),
        ),
        "step 1, chunk 0, task source Sinusoid, task train/seed=0/step=1/task=0: query loss is nan. Lower",
    ),
    "metrics that cannot be written": (
        used_run(remove("metrics.jsonl"), lambda directory: (directory / "metrics.jsonl").mkdir(), then=resume()),
        f"{RUN}/metrics.jsonl: could not be written (Is a directory). Free space or correct permissions",
    ),
    **{
        f"the only checkpoint's {name} changed": (
            used_run(one_checkpoint, flip(name), then=resume()),
            f"{STEP_2} ... torn or altered. The checkpoint is not used. ... {NONE_INTACT}",
        )
        for name in CHECKPOINT_FILES
    },
    "the only checkpoint's theta lost": (
        used_run(one_checkpoint, remove(f"{NEWEST}/theta.safetensors"), then=resume()),
        f"{STEP_2}: theta.safetensors is missing. The checkpoint is not used. ... {NONE_INTACT}",
    ),
    "evaluating the only checkpoint, changed": (
        used_run(one_checkpoint, flip("theta.safetensors"), then=evaluate()),
        f"{STEP_2}: theta.safetensors ... torn or altered. ... {NONE_INTACT}",
    ),
    "evaluating the step that is changed": (
        used_run(flip("theta.safetensors"), then=evaluate("--step", "2")),
        f"{STEP_2}: theta.safetensors ... torn or altered. ... not used. Choose another --step; there are 1.",
    ),
}

HEALED: dict[str, tuple[Prepare, str]] = {
    **{
        f"the newest checkpoint's {name} changed": (
            used_run(flip(name), then=resume()),
            f"{STEP_2} ... torn or altered. ... Trying the one before. ... Going on from step 1 of {RUN}",
        )
        for name in CHECKPOINT_FILES
    },
    "the newest manifest torn": (
        used_run(cut("manifest.json", 60), then=resume()),
        f"{STEP_2}: manifest.json is torn or altered. ... Going on from step 1",
    ),
    "the newest manifest empty": (
        used_run(cut("manifest.json", 0), then=resume()),
        f"{STEP_2}: manifest.json is torn or altered. ... Going on from step 1",
    ),
    "the newest manifest not written": (
        used_run(remove(f"{NEWEST}/manifest.json"), then=resume()),
        f"Going on from step 1 of {RUN}",
    ),
    "the only manifest not written": (
        used_run(one_checkpoint, remove(f"{NEWEST}/manifest.json"), then=resume()),
        f"{STEP_2} has no manifest.json: it was not finished and does not count.",
    ),
    "the newest theta cut short": (
        used_run(cut("theta.safetensors", 100), then=resume()),
        f"{STEP_2}: theta.safetensors ... Going on from step 1",
    ),
    "the newest theta lost": (
        used_run(remove(f"{NEWEST}/theta.safetensors"), then=resume()),
        f"{STEP_2}: theta.safetensors is missing. ... Going on from step 1",
    ),
    "metrics torn": (
        used_run(replace("metrics.jsonl", b'{"step": 1, "lo\xff'), then=resume()),
        f"Going on from step 2 of {RUN}",
    ),
}
"""The newest checkpoint is not used: the run goes on from the one before, and makes the newest again."""
