"""Wrong configs."""

from itertools import pairwise

from tests.bad_input.builders import (
    CONV,
    GOOD,
    Prepare,
    command,
    config,
    edited,
    images,
    pool,
    setting,
)

LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)
"""Nine to the ninth values in nine lines."""

WRONG_CONFIGS: dict[str, tuple[Prepare, str]] = {
    "misspelt task key": (
        edited("queries: 3", "quries: 3"),
        "task.quries is not a known key (bad.yaml, line 4) ... Did you mean task.queries?",
    ),
    "misspelt model key": (
        edited("hidden", "hiden"),
        "model.hiden ... (bad.yaml, line 7) ... Did you mean model.hidden?",
    ),
    "misspelt algorithm key": (
        edited("inner_lr", "inner_rate"),
        "algorithm.inner_rate ... line 10 ... Did you mean algorithm.inner_lr?",
    ),
    "misspelt outer key": (edited("  lr:", "  rl:"), "outer.rl ... line 12 ... Did you mean outer.lr?"),
    "misspelt training key": (
        edited("meta_batch_size", "metabatch"),
        "training.metabatch ... line 15 ... training.meta_batch_size?",
    ),
    "misspelt evaluation key": (
        edited("episodes", "episode"),
        "evaluation.episode is ... line 18 ... evaluation.episodes?",
    ),
    "misspelt scaling key": (edited("num_workers", "workers"), "scaling.workers ... line 20 ... scaling.num_workers?"),
    "misspelt run key": (
        edited("checkpoint_config", "checkpoints"),
        "run.checkpoints ... line 23 ... run.checkpoint_config?",
    ),
    "misspelt checkpoint key": (
        edited("checkpoint_frequency", "frequency"),
        "run.checkpoint_config.frequency ... line 24 ... run.checkpoint_config.checkpoint_frequency?",
    ),
    "key like no other": (edited("hidden", "zzz"), "model.zzz ... line 7 ... Valid here: name, hidden, batch_norm."),
    "misspelt section": (
        edited("training:", "trainning:"),
        "trainning is not a known key (bad.yaml, line 13) ... Did you mean training?",
    ),
    "misspelt task": (
        edited("sinusoid", "sinus"),
        "task.name must be one of sinusoid, ... got 'sinus' (bad.yaml, line 2) ... Did you mean 'sinusoid'?",
    ),
    "misspelt model": (edited("mlp", "mpl"), "model.name ... got 'mpl' (bad.yaml, line 6) ... Did you mean 'mlp'?"),
    "misspelt algorithm": (
        edited("maml", "mamml"),
        "algorithm.name ... got 'mamml' (bad.yaml, line 9) ... Did you mean 'maml'?",
    ),
    "algorithm of no installed package": (
        edited("maml", "qqq"),
        "got 'qqq' (bad.yaml, line 9) ... is their package installed?",
    ),
    "a list for a name": (edited("name: maml", "name: [maml]"), "algorithm.name ... got ['maml'] ... line 9"),
    "negative rate": (
        edited("0.01", "-0.4"),
        "algorithm.inner_lr must be > 0, got -0.4 (bad.yaml, line 10) ... Try 0.4.",
    ),
    "rate that is no number": (edited("0.01", ".nan"), "algorithm.inner_lr must be ... got nan (bad.yaml, line 10)"),
    "infinite rate": (
        edited("0.01", ".inf"),
        "algorithm.inner_lr must be a finite number, got inf (bad.yaml, line 10)",
    ),
    "text for a number": (
        edited("0.01", "fast"),
        "algorithm.inner_lr must be a number, got 'fast' (bad.yaml, line 10) ... Write a number.",
    ),
    "quoted number": (
        edited("0.01", "'1e-2'"),
        "algorithm.inner_lr must be a number, got '1e-2' ... Write 0.01 without quotes.",
    ),
    "date for a number": (
        edited("0.01", "2024-05-01"),
        "algorithm.inner_lr must be a number, got '2024-05-01' ... line 10",
    ),
    "half a step": (
        setting("algorithm.inner_steps=1.5"),
        "algorithm.inner_steps must be a whole number, got 1.5 (--set) ... Try 2.",
    ),
    "true for a number": (
        edited("steps: 2", "steps: true"),
        "training.steps must be a whole number, got True (bad.yaml, line 14)",
    ),
    "nothing for a number": (
        edited("steps: 2", "steps:"),
        "training.steps must be a whole number, got nothing (bad.yaml, line 14) ... leave the key out",
    ),
    "no steps": (
        edited("steps: 2", "steps: 0"),
        "training.steps must be >= 1, got 0 (bad.yaml, line 14) ... Raise it.",
    ),
    "number for text": (
        edited("name: x", "name: 2024"),
        "run.name must be text, got 2024 (bad.yaml, line 22) ... Write '2024' in quotes.",
    ),
    "wrong literal": (
        setting("algorithm.order=third"),
        "algorithm.order must be one of 'first' or 'second', got 'third' ... Choose one",
    ),
    "width of 0": (edited("[4]", "[4, 0]"), "model.hidden.1 must be >= 1, got 0 (bad.yaml, line 7) ... Raise it."),
    "three betas": (
        setting("outer.betas=[0.9, 0.99, 0.999]"),
        "outer.betas must be a list of 2 values, got [0.9, 0.99, 0.999]",
    ),
    "missing section": (
        edited("model:\n  name: mlp\n  hidden: [4]\n", ""),
        "model.name must be given: one of mlp, conv4, resnet12 (bad.yaml) ... Add `model: {name: mlp}`.",
    ),
    "missing pool": (
        edited("name: sinusoid\n  shots: 3\n  queries: 3", "name: few_shot"),
        "task.pool must be given (bad.yaml, line 1) ... Add it.",
    ),
    "list for a section": (
        edited("outer:\n  lr: 0.001", "outer: []"),
        "outer must be a section of keys, got [] (bad.yaml, line 11) ... Indent",
    ),
    "value for a section": (
        edited("outer:\n  lr: 0.001", "outer: false"),
        "outer must be a section of keys, got False (bad.yaml, line 11)",
    ),
    "several mistakes": (
        config(GOOD.replace("0.01", "-1").replace("hidden", "hiden")),
        "model.hiden ... line 7 ... algorithm.inner_lr ... line 10",
    ),
    "empty file": (
        config(""),
        "bad.yaml: a config is a mapping of sections ... got nothing ... Start from a file in configs/.",
    ),
    "list for a mapping": (
        config("- task\n- model\n"),
        "bad.yaml: a config is a mapping of sections ... got list ... Start from a file",
    ),
    "bracket left open": (
        edited("[4]", "[4"),
        "bad.yaml, line 8: not valid YAML (expected ',' or ']' ... Check indentation and quotes there.",
    ),
    "tab": (edited("  lr", "\tlr"), "bad.yaml, line 12: not valid YAML ... Check indentation"),
    "duplicate key": (
        edited("  lr: 0.001", "  lr: 0.001\n  lr: 0.1"),
        "outer.lr is written twice (bad.yaml, lines 12 and 13) ... Keep one",
    ),
    "list for a key": (config(GOOD + "? [a]\n: 3\n"), "bad.yaml, line 25: a key must be text ... Name the key."),
    "section within itself": (
        config(GOOD + "x: &x\n  y: *x\n"),
        "bad.yaml ... not valid YAML (a section that holds itself",
    ),
    "tag that would run code": (
        edited("0.01", "!!python/object/apply:os.getcwd []"),
        "bad.yaml, line 10: not valid YAML ... python/object",
    ),
    "binary file": (
        config(b"\x89PNG\r\n\x1a\n\xff"),
        "bad.yaml: not a readable text file ... Give the path of a YAML file.",
    ),
    "file with a zero byte": (
        config(GOOD.encode() + b"# \x00"),
        "bad.yaml, line 25: not valid YAML (the character 0x00 is no text)",
    ),
    "no such file": (command("train", "nope.yaml"), "nope.yaml: no such config file ... Give the path of a YAML file."),
    "config that is a directory": (
        command("train", "."),
        ".: not a readable text file ... Give the path of a YAML file.",
    ),
    "--set without =": (
        setting("training.steps"),
        "--set takes section.key=value, got 'training.steps' ... For example: --set training.steps=3000.",
    ),
    "--set of a section": (setting("steps=3"), "--set takes section.key=value, got 'steps=3'"),
    "--set of an unknown key": (
        setting("training.step=3"),
        "training.step is not a known key (--set) ... Did you mean training.steps?",
    ),
    "--set of an unknown section": (
        setting("trainin.steps=3"),
        "trainin is not a known key (--set) ... Did you mean training?",
    ),
    "--set of no YAML": (
        setting("model.hidden=[4"),
        "--set model.hidden: '[4' is not a YAML value (expected ... Check its brackets and quotes.",
    ),
    "--set below a value": (
        setting("training.steps.x=3"),
        "--set training.steps.x: steps is a value ... Shorten the key.",
    ),
    "chunk above the meta-batch": (
        edited("chunk_size: 1", "chunk_size: 3"),
        "training.chunk_size must be at most training.meta_batch_size = 2, got 3 (bad.yaml, line 16) ... Lower it.",
    ),
    "momentum with adam": (
        setting("outer.momentum=0.9"),
        "outer.momentum is for outer.optimizer: sgd, got 0.9 with adam (--set) ... Use outer.betas or sgd.",
    ),
    "compiled and recomputed": (
        setting("algorithm.checkpoint_inner_steps=true", "training.compile=true"),
        "training.compile must be false or auto with algorithm.checkpoint_inner_steps, got True ... Leave it out.",
    ),
    "momentum of plain inner steps": (
        setting("algorithm.inner_momentum=0.9"),
        "algorithm.inner_momentum is for inner_optimizer: momentum or adam, not sgd (--set) ... Leave it out.",
    ),
    "a pattern that matches nothing": (
        setting("algorithm.adapt=haed"),
        "algorithm.adapt: 'haed' matches no parameter of the model. Use head, body or a pattern of these names",
    ),
    "a misspelt alias": (
        setting("algorithm.adpat=head"),
        "algorithm.adpat is not a known key (--set). Did you mean algorithm.adapt?",
    ),
    "warmup as long as the run": (
        setting("outer.warmup_steps=2"),
        "outer.warmup_steps must be below training.steps = 2, got 2 ... Lower it.",
    ),
    "final_lr above lr": (
        setting("outer.final_lr=0.5"),
        "outer.final_lr must be at most outer.lr = 0.001, got 0.5 ... Lower it.",
    ),
    "more workers at least than at most": (
        edited("num_workers: 0", "num_workers: [3, 1]"),
        "scaling.num_workers is (min, max) ... got (3, 1) (bad.yaml, line 20) ... Swap them.",
    ),
    "negative workers": (
        edited("num_workers: 0", "num_workers: -1"),
        "scaling.num_workers must be >= 0 or a list, got -1 ... Try 1.",
    ),
    "ranks without workers": (
        setting("scaling.backend=train"),
        "scaling.num_workers must be at least 1 with scaling.backend: train, got 0 (bad.yaml, line 20) ... Raise it",
    ),
    "a fast reduction of actors": (
        setting("scaling.reduce=fast"),
        "scaling.reduce is for scaling.backend: train, got fast with actors (--set). Leave it out.",
    ),
    "a sharded optimizer of actors": (
        setting("scaling.shard_optimizer=true"),
        "scaling.shard_optimizer is for scaling.backend: train, got True with actors (--set). Leave it out.",
    ),
    "parts of two GPUs": (
        setting("scaling.resources_per_worker={GPU: 1.5}"),
        "scaling.resources_per_worker.GPU must be at most 1 or a whole number, got 1.5 (--set) ... try 1.",
    ),
    "a GPU's code without a GPU": (
        setting("scaling.use_gpu=true", "scaling.resources_per_worker={CPU: 1, GPU: 0}"),
        "scaling.resources_per_worker.GPU must be above 0 with scaling.use_gpu, got 0 (--set) ... a fraction",
    ),
    "a label's rule that Ray does not know": (
        setting("scaling.label_selector={zone: a || b}"),
        "scaling.label_selector.zone ... got 'a || b' (--set)",
    ),
    "run.name with a slash": (
        edited("name: x", "name: a/b"),
        "run.name must be the name of one directory, got 'a/b' (bad.yaml, line 22) ... Use run.storage_path for paths.",
    ),
    "run.storage_path of nothing": (
        setting("run.storage_path=''"),
        "run.storage_path must be a directory or a URI, got '' (--set) ... Use . for",
    ),
    "a width that no machine holds": (
        edited("[4]", "[1000000000000000000]"),
        "model MLP cannot be built for this task: RuntimeError: ... can't allocate memory ... Correct section `model`",
    ),
    "a width that is no number of torch's": (
        edited("[4]", "[9223372036854775808]"),
        "model MLP cannot be built for this task: TypeError: ... Correct section `model`",
    ),
    "a billion laughs": (
        config(LAUGHS),
        "bad.yaml, line 5: holds more than 20000 values, aliases counted where they are used ... Write them out",
    ),
    "a billion laughs in --set": (
        setting(
            "model.hidden=[&a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a], &c"
            " [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b], &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c], *d, *d]"
        ),
        "--set model.hidden, line 1: holds more than 20000 values",
    ),
    "sections without a bottom": (
        config("a: " + "{a: " * 40 + "1" + "}" * 40),
        "bad.yaml: not valid YAML (a section that holds itself, or too many brackets). Check",
    ),
    "a book": (
        config(GOOD + "# blah\n" * 200_000),
        "bad.yaml: holds 14 ... characters, and a config at most 1048576.",
    ),
    "batch norm without a policy": (
        pool(images(16, 16), config=CONV.replace("  batch_norm: support\n", "")),
        "training.batch_norm must be given ... --set training.batch_norm=transductive",
    ),
}
"""What is done, and what the message holds, its parts in this order."""
