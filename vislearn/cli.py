"""The verbs that need torch: LightningCLI for `fit`, `unlearn`, `evaluate`, `continual`, and the entries of others."""

import difflib
import inspect
import logging
import re
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from . import audit, datamodules, methods, processes, progress, runs, wandb_logging
from . import forget_values as forget_values  # so that the parser knows its names
from . import private as private  # likewise
from .arguments import config_of_artifact, fit_command, own_defaults, retrain_command
from .data import ForgetDataModule
from .errors import UserError
from .learner import Classifier, Learner, Regressor
from .method import UnlearningMethod
from .store import Store
from .trainer import DEFAULTS, Trainer


class Parser(LightningArgumentParser):
    """A parser whose every complaint is one line that says what would be right."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise UserError(one_line(message, self))


TOP = ("config", "data", "downstream", "evaluation", "keep", "method", "model", "original", "out", "relearn",
       "requests", "retrained", "seed_everything", "setting", "shadows", "store", "strategy", "trainer", "unlearn_data",
       "unlearn_seed", "unlearned")  # fmt: skip
RULES = ("ClassForget", "SubclassForget", "RandomForget", "IndexForget", "GroupForget", "IdentifiedForget",
         "BandForget", "QuantileForget", "TimeForget",
         "Backdoor", "ClassConfusion", "LabelNoise", "BadRows")  # fmt: skip
UNKNOWN = re.compile(
    r"(?:[Uu]nrecognized arguments?|[Oo]ption|[Kk]ey|No action for key|Group|accept nested key) *:? *"
    r"['\"]?-{0,2}([\w.]+)"
)
NO_CLASS = re.compile(r"^(?:Parser key \"(\w+)\")?.*Expected a dot import path string: (\S+).*")

# what other types than the one that was meant would have wanted
NOISE = re.compile(
    r"Does not validate against any of the Union subtypes.*?(?=- )|Problem with given class_path "
    r"| ?- Expected a <class 'NoneType'> Given value type: <class '[\w.]+'> "
    r"Given value: (?:NestedArg\(.*?\)(?= - |$)|\S+)"
)
REQUIRED = re.compile(r"(are required: )(?:continual|evaluate|fit|unlearn)\.(\w+)")
LACKING = re.compile(r"(are required: [\w, ]+?) init_args=Namespace\(.*\)+$")
QUOTED = re.compile(r'"([^"]+)"')
PARSER_KEYS = re.compile(r"^(?:Parser key \"[^\"]+\": - )+")


def one_line(message: str, parser: Any) -> str:
    """The heart of a parser's message, with the nearest known name where a name is unknown."""
    text = " ".join(str(message).split())
    no_class = NO_CLASS.match(text)
    if no_class:
        where, name = no_class.groups()
        known = [*methods.__all__, *methods.STRATEGIES, *datamodules.__all__, "Classifier", "Regressor", *RULES]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "a class of your own is named with its module, my_file.Mine"
        if where == "strategy" and not near:
            hint = f"there are {', '.join(methods.STRATEGIES)}, and {hint}"
        return f"there is no class '{name}' for {where or 'this option'}; {hint}"
    text = LACKING.sub(r"\1", REQUIRED.sub(r"\1--\2", NOISE.sub("", text)))
    keys = PARSER_KEYS.match(text)
    if keys:  # where it is, as the option is written
        option = ".".join(QUOTED.findall(keys[0]))
        inner = re.sub(r"^--([\w.]+: )", r".\1", text[keys.end() :])  # an option within an option is said in one
        text = f"--{option}{inner}" if inner.startswith(".") else f"--{option}: {inner}"
    unknown = UNKNOWN.findall(text)
    near_one = next(filter(None, (near_name(name, parser, text) for name in reversed(unknown))), None)
    if near_one and "did you mean" not in text:
        text += f" (did you mean '{near_one}'?)"
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-280:]}"


def near_name(asked: str, parser: Any, text: str) -> str | None:
    """The known option that looks most like `asked`; the options of the classes that the message is about included."""
    first, last = asked.split(".")[0], asked.split(".")[-1]
    if first not in TOP and "." in asked:
        last, known = first, set(TOP)
    else:
        known = {str(action.dest).split(".")[-1] for action in getattr(parser, "_actions", [])} | set(TOP)
        zoo = [getattr(package, name) for package in (methods, datamodules) for name in package.__all__ if name in text]
        for cls in [*zoo, *(c for c in (Classifier, Regressor) if c.__name__ in text or "model" in text)]:
            known |= parameters(cls)
    found = difflib.get_close_matches(last, sorted(known), n=1, cutoff=0.6)
    return found[0] if found and found[0] != last else None


def parameters(cls: type) -> set[str]:
    """Constructor arguments of a class and of its parents."""
    return {
        p for c in cls.__mro__ if "__init__" in vars(c) and c.__module__.startswith("vislearn")
        for p in inspect.signature(vars(c)["__init__"]).parameters
    } - {"self", "kwargs"}  # fmt: skip


def link_model_to_data(parser: LightningArgumentParser) -> None:
    """The data say how many classes and channels there are, and how large the images."""
    for name, argument in (("num_classes", "num_classes"), ("image_size", "image_size"), ("channels", "in_channels")):
        parser.link_arguments(f"data.{name}", f"model.init_args.{argument}", apply_on="instantiate")
    parser.set_defaults({"model": {"class_path": "vislearn.learner.Classifier"}})


def resolving_parser() -> LightningArgumentParser:
    """The parser that `fit` and `unlearn` have in common, for whole configurations given as data."""
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--unlearn_seed", type=int, default=0)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults({f"trainer.{k}": v for k, v in DEFAULTS.items()})
    parser.add_lightning_class_args(Learner, "model", subclass_mode=True)
    parser.add_lightning_class_args(ForgetDataModule, "data", subclass_mode=True)
    parser.add_subclass_arguments(UnlearningMethod, "method", required=False)
    link_model_to_data(parser)
    return parser


class CLI(LightningCLI):
    """Each verb is a method of `Trainer` whose typed parameters are the flags."""

    def __init__(self, argv: list[str], args: list[str]) -> None:
        self.argv = argv  # as the user typed it
        super().__init__(
            Learner, ForgetDataModule, trainer_class=Trainer, subclass_mode_model=True, subclass_mode_data=True,
            seed_everything_default=0, auto_configure_optimizers=False, save_config_callback=None, args=args,
            parser_class=Parser, load_from_checkpoint_support=False, parser_kwargs={"allow_abbrev": False},
            trainer_defaults=DEFAULTS,
        )  # fmt: skip

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        both = {"model", "datamodule"}
        return {"fit": {*both, "train_dataloaders", "val_dataloaders", "ckpt_path", "weights_only"},
                "unlearn": both, "evaluate": both, "continual": both}  # fmt: skip

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--store", type=str, default="artifacts", help="folder of the stored models")
        parser.add_argument("--watch", type=bool, default=False, help="let W&B record gradients and weights")
        link_model_to_data(parser)

    @property
    def plain_config(self) -> dict[str, Any]:
        """The resolved configuration of this verb as plain data, complete with defaults."""
        assert self.subcommand is not None
        parser = self._subcommand_parsers[self.subcommand]
        text = parser.dump(self.config[self.subcommand], skip_unset=False, skip_validation=True)
        out = yaml.safe_load(text)
        for extra in ("config", "store", "watch", "original", "retrained", "unlearned", "evaluation",
                      "downstream", "shadows"):  # fmt: skip
            out.pop(extra, None)
        return out

    @property
    def artifact_store(self) -> Store:
        return Store(Path(self.config[self.subcommand].store))

    def fit(self, model: Learner, datamodule: ForgetDataModule) -> None:
        """Train and store; takes the place of the Trainer's method of that name."""
        assert isinstance(self.trainer, Trainer)
        self.check_command()
        self.start_loggers(model)
        made = runs.fit(model, datamodule, self.trainer, self.plain_config, self.artifact_store)
        wandb_logging.fitted(self.trainer, self.artifact_store, made, datamodule)

    def check_command(self) -> None:
        """Refuse to start further processes of a command that is not this process's own: they would run that one."""
        assert isinstance(self.trainer, Trainer)
        if self.trainer.starts_processes and self.argv != sys.argv[1:]:
            raise UserError("several devices need a command of their own: start `vislearn "
                            f"{self.argv[0]}` from a shell, or give --trainer.devices=1")  # fmt: skip

    def start_loggers(self, model: Learner) -> None:
        """Every logger gets the resolved configuration, once and nested; W&B watches the weights when asked to."""
        assert isinstance(self.trainer, Trainer)
        watch = self.config[self.subcommand].watch
        wandb_logging.begin(self.trainer, self.plain_config, model if watch else None)

    def unlearn(self, model: Learner, datamodule: ForgetDataModule, **options: Any) -> None:
        """Unlearn, evaluate and store; prints the numbers."""
        assert isinstance(self.trainer, Trainer)
        self.check_command()
        self.start_loggers(model)
        store = self.artifact_store
        options["fit_command"] = fit_command(self.argv)
        seed = self.config[self.subcommand].seed_everything
        options["retrain_command"] = retrain_command(self.argv, seed + 1)
        made = runs.unlearn(model, datamodule, trainer=self.trainer, config=self.plain_config, store=store, **options)
        if not self.trainer.is_global_zero:
            return
        comparison = (store[made].report or {})["comparison"]
        if self.trainer.loggers:
            from .results import audit_results

            results = audit_results(comparison, datamodule, self.plain_config, ["vislearn", *self.argv])
            wandb_logging.compared(self.trainer, store[made], results)
        show(comparison)

    def evaluate(self, model: Learner, datamodule: ForgetDataModule, **options: Any) -> None:
        """Audit checkpoints; prints the numbers and writes the page."""
        options["retrained"] = options.get("retrained") or []
        tier = options["evaluation"]
        start = time.perf_counter()
        rule = runs.evaluate(model, datamodule, self.artifact_store, config=self.plain_config, **options)
        from .report import write_page
        from .results import audit_results

        results = audit_results(rule, datamodule, self.plain_config, ["vislearn", *self.argv])
        results |= {"evaluation": {"tier": tier}, "seconds": time.perf_counter() - start}
        show(rule, results)
        page = Path("audit.html")
        write_page(results, page)
        print(f"report: {page.resolve()}")

    def continual(self, model: Learner, datamodule: ForgetDataModule, **options: Any) -> None:
        """Carry out a stream of requests; stores every step, prints the table and writes the page."""
        from .continual_output import deliver

        assert isinstance(self.trainer, Trainer)
        if self.config[self.subcommand].watch:
            raise UserError("--watch follows one network, and every request of a stream has a copy of its own; leave "
                            "out --watch")  # fmt: skip
        seed = self.config[self.subcommand].seed_everything
        deliver(model=model, data=datamodule, trainer=self.trainer, config=self.plain_config, seed=seed,
                store=self.artifact_store, command=["vislearn", *self.argv],
                begin=lambda: self.start_loggers(model), **options)  # fmt: skip


def show(rule: dict[str, Any], results: dict[str, Any] | None = None) -> None:
    """One rule's table in the terminal."""
    from .report import print_table
    from .results import printable

    print_table(results or printable(rule))


def quiet() -> None:
    """Lightning's remarks about things that are meant here stay out of the way."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (".*does not have many workers.*", ".*in eval mode.*", ".*`train_dataloader`.*",
                 ".*no `val_dataloader`.*",
                 ".*LightningCLI's args parameter.*", ".*GPU available but not used.*", ".*lr_scheduler.step.*",
                 ".*smaller than the logging interval.*", ".*is not a valid.*batch size.*", ".*Trying to infer.*",
                 ".*isinstance.*LeafSpec.*", ".*Checkpoint directory.*", ".*val_dataloader.*",
                 "Grad strides do not match"):  # fmt: skip
        warnings.filterwarnings("ignore", text)


def main(argv: list[str] | None = None) -> None:
    """Run a verb of `CLI`, or `measure`; exit code 2 and one line where the input is at fault."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet()
    if argv[0] == "continual":  # the parser knows the classes that are imported
        for name in methods.STRATEGIES:
            getattr(methods, name)

    def run() -> None:
        if argv[0] == "measure":
            audit.main(argv[1:])
            return
        with wandb_logging.one_run(), progress.bar(argv[0]) if processes.first_process() else nullcontext():
            CLI(argv, own_defaults(config_of_artifact(argv)))

    guarded(run)


def benchmark(argv: list[str]) -> int:
    """Run `vislearn benchmark`; the exit code is 1 when a job failed."""
    from .benchmark import main as run

    quiet()
    return guarded(lambda: run(argv))


def hardest(argv: list[str]) -> int:
    """Run `vislearn hardest`."""
    from .hardest import main as run

    quiet()
    return guarded(lambda: run(argv))


def user_error(error: BaseException | None) -> UserError | None:
    """The user's error behind an exception: the parser wraps those of a constructor in its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def guarded(action: Any) -> Any:
    """Turn a user's error into one line and exit code 2, an interruption into 130.

    Of several processes one says what went wrong. The others end quietly; Lightning would kill the first of them when
    another ended badly.
    """
    try:
        return action()
    except BaseException as error:
        if processes.silent():
            raise SystemExit(2 if processes.first_process() else 0) from None
        said = user_error(error) if isinstance(error, UserError | ValueError) else None
        if said is not None:
            print(f"vislearn: error: {said}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, KeyboardInterrupt):
            print("vislearn: interrupted; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        raise
