"""The plugin: which files and numbers the Geometry tab is served.

No route makes a path of what a request says: runs, tags and steps are looked up in the index, files in one table.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard import context, errors
from tensorboard.backend import http_util
from tensorboard.backend.event_processing import data_ingester
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from tensorboard.util import tb_logging
from werkzeug import wrappers

from .reading import Index, Kept, Run

_HERE = Path(__file__).parent
_FILES = {
    **{f"/{name}.js": "text/javascript" for name in ("index", "charts", "depth", "samples", "slices")},
    "/style.css": "text/css",
}
_CONVENTIONS = "geometry/conventions/text_summary"
_POINTS = 150  # of a trajectory: what is drawn at a click, and more than the eye tells apart
_PATIENCE = 0.4  # seconds that a request waits for a walk through the files to end

Request = Mapping[str, str]


class GeometryPlugin(base_plugin.TBPlugin):
    """TensorBoard's Geometry tab."""

    plugin_name = "geometry"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._index = Index(_directories(context))
        self._walk: threading.Thread | None = None
        self._starting = threading.Lock()

    def is_active(self) -> bool:
        """Whether a log of before this tab is there; TensorBoard itself asks for tensors of this plugin's name."""
        if self._provider is None:
            return False
        told = self._provider.list_tensors(
            context.RequestContext(),
            experiment_id="",
            plugin_name="text",
            run_tag_filter=provider.RunTagFilter(tags=[_CONVENTIONS]),
        )
        return any(told.values())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab's name, and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Geometry")

    def get_plugin_apps(self) -> dict[str, Any]:
        """The routes, under data/plugin/geometry."""
        answers = (self.runs, self.depth, self.layer, self.samples, self.map, self.profile)
        files = {route: _file(_HERE / route[1:], kind) for route, kind in _FILES.items()}
        return {
            **files,
            "/plotly.min.js": _file(_plotly(), "text/javascript", hours=24),
            **{f"/{answer.__name__}": _json(answer) for answer in answers},
        }

    def runs(self, request: Request) -> Any:
        """The runs with geometry, and how far the files are read; reads on."""
        with self._starting:
            if self._walk is None or not self._walk.is_alive():
                self._walk = threading.Thread(target=self._read_on, daemon=True)
                self._walk.start()
        self._walk.join(_PATIENCE)
        with self._index.lock:
            found = {name: run for name, run in sorted(self._index.runs.items()) if run.records or _old(run)}
            return {
                "reading": self._walk.is_alive(),
                "read": self._index.read,
                "total": self._index.total,
                "plotly": _plotly().is_file(),
                "runs": [{"name": name, **_summary(run)} for name, run in found.items()],
            }

    def depth(self, request: Request) -> Any:
        """One number of every layer at every step: layers in the order of firing, rows of ``values``."""
        number = request.get("number", "median")
        with self._index.lock:
            run = self._run(request)
            probes = run.records.get(("probe", ""), {})
            if not probes:
                return _old_depth(run, number)
            steps = sorted(probes)
            layers = {layer["name"]: layer for step in steps for layer in probes[step].head["layers"]}
            numbers = list(dict.fromkeys(name for step in steps for name in probes[step].head["numbers"]))
            values = np.full((len(layers), len(steps)), np.nan, "f4")
            rows = {name: row for row, name in enumerate(layers)}
            for column, step in enumerate(steps):
                head, statistics = probes[step].head, probes[step].statistics
                if statistics is not None and number in head["numbers"]:
                    own = [rows[layer["name"]] for layer in head["layers"]]
                    values[own, column] = statistics[:, head["numbers"].index(number)]
        return {"steps": steps, "layers": list(layers.values()), "numbers": numbers, "values": values}

    def layer(self, request: Request) -> Any:
        """Every sample's value, prediction and margin in one layer, over the steps; its spectrum at ``step``."""
        with self._index.lock:
            probes = dict(self._run(request).records.get(("probe", ""), {}))
        name, at = request.get("layer", ""), int(request.get("step", -1))
        steps = [s for s in sorted(probes) if _place(probes[s], name) is not None]
        if not steps:
            raise errors.NotFoundError(f"layer {name!r}")
        at = min(steps, key=lambda step: abs(step - at))
        chosen = set(steps[:: -(-len(steps) // _POINTS)]) | {at, steps[-1]}
        steps = [step for step in steps if step in chosen]
        of = [self._index.unpacked(probes[step], "value", "predictions", "margin") for step in steps]
        size = max(arrays["value"].shape[1] for arrays in of)
        rows = {"value": np.full((len(of), size), np.nan, "f4")}
        rows |= {key: np.full((len(of), size), np.nan, "f4") for key in ("predictions", "margin") if key in of[-1]}
        for row, (step, arrays) in enumerate(zip(steps, of, strict=True)):
            for key in rows:
                if key in arrays:
                    own = arrays[key][_place(probes[step], name)] if key == "value" else arrays[key]
                    rows[key][row, : len(own)] = own
        place = _place(probes[at], name)
        detail = self._index.unpacked(probes[at], "sigma", "extremes", "directions")
        more: dict[str, Any] = {key: array[place] for key, array in detail.items()}
        if "directions" in more:
            more |= {"directions": _encoded(more["directions"]), "shape": more["directions"].shape}
        return {"steps": steps, "step": at, "about": probes[at].head["layers"][place], **rows, **more}

    def samples(self, request: Request) -> Any:
        """What the samples are: indices, labels, thumbnails."""
        with self._index.lock:
            known = self._run(request).records.get(("samples", ""), {})
            kept = known[max(known)] if known else None
        return {} if kept is None else {**kept.head, **_pictures(self._index.unpacked(kept, "thumbnails"))}

    def map(self, request: Request) -> Any:
        """One slice map at one step, each layer's range that over all steps."""
        kept, spans = self._record(request, "map")
        low = np.nanmin([span[:, 0] for span in spans if span.shape == spans[-1].shape], axis=0)
        high = np.nanmax([span[:, 1] for span in spans if span.shape == spans[-1].shape], axis=0)
        arrays = self._index.unpacked(kept, "value", "predictions", "entropy", "corners")
        pictures = _pictures(self._index.unpacked(kept, "thumbnails"))
        return {**kept.head, **arrays, **pictures, "range": np.stack([low, high], 1)}

    def profile(self, request: Request) -> Any:
        """The profiles of one study."""
        return self._record(request, "profile")[0].head

    def _read_on(self) -> None:
        try:
            self._index.update()
        except Exception:
            tb_logging.get_logger().exception("the Geometry tab could not read the event files")

    def _record(self, request: Request, kind: str) -> tuple[Kept, list[np.ndarray]]:
        with self._index.lock:
            series = self._run(request).records.get((kind, request.get("tag", "")), {})
            kept = series.get(int(request.get("step", -1)))
            if kept is None:
                raise errors.NotFoundError(f"{kind} {request.get('tag')!r} at step {request.get('step')}")
            return kept, [other.statistics for other in series.values() if other.statistics is not None]

    def _run(self, request: Request) -> Run:
        run = self._index.runs.get(request.get("run", ""))
        if run is None:
            raise errors.NotFoundError(f"run {request.get('run')!r}")
        return run


def _directories(context: base_plugin.TBContext) -> dict[str, str | None]:
    flags = context.flags
    if flags is not None and not flags.logdir and flags.logdir_spec:
        return data_ingester._parse_event_files_spec(flags.logdir_spec)
    return {os.path.expanduser(context.logdir): None} if context.logdir else {}


def _old(run: Run) -> bool:
    return run.told and bool(run.scalars)


def _summary(run: Run) -> dict[str, Any]:
    steps = run.steps("probe")
    things = {
        kind: {tag: run.steps(kind, tag) for own, tag in run.records if own == kind and run.steps(kind, tag)}
        for kind in ("map", "profile")
    }
    who = [Path(kept.place.path).name for kept in run.records.get(("samples", ""), {}).values()]
    return {"probes": len(steps), "last": steps[-1:], "samples": who[-1:], "old": not steps and _old(run), **things}


def _old_depth(run: Run, number: str) -> Any:
    numbers = sorted(run.scalars, key=lambda name: (name not in ("logvol", "frame_volume"), name))
    chart = numbers[0] if number == "median" and numbers else number
    series = run.scalars.get(chart, {})
    steps = sorted({step for own in series.values() for step in own})
    values = np.array([[own.get(step, np.nan) for step in steps] for _, own in sorted(series.items())])
    layers = [{"name": label} for label in sorted(series)]
    return {"steps": steps, "layers": layers, "numbers": numbers, "values": values, "old": True}


def _place(kept: Kept, layer: str) -> int | None:
    return next((place for place, own in enumerate(kept.head["layers"]) if own["name"] == layer), None)


def _pictures(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    pictures = arrays.get("thumbnails")
    return {} if pictures is None else {"thumbnails": _encoded(pictures), "shape": pictures.shape}


def _encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _plain(value: Any) -> Any:
    # Null for what is not finite, and no more digits than float32 has.
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} in an answer")
    if value.dtype.kind != "f":
        return value.tolist()
    numbers = value.astype(float)
    with np.errstate(all="ignore"):
        power = 10.0 ** (6 - np.floor(np.log10(np.abs(numbers))))
        numbers = np.where(np.isfinite(power), np.round(numbers * power) / power, numbers)
    plain = numbers.astype(object)
    plain[~np.isfinite(numbers)] = None
    return plain.tolist()


def _json(answer: Callable[[Request], Any]) -> Any:
    @wrappers.Request.application
    def app(request: wrappers.Request) -> wrappers.Response:
        try:
            text = json.dumps(answer(request.args), default=_plain, allow_nan=False)
        except errors.PublicError as error:
            return http_util.Respond(request, {"error": str(error)}, "application/json", code=error.http_code)
        except (OSError, ValueError, LookupError, zlib.error) as error:  # a damaged file, a step that is no number
            return http_util.Respond(request, {"error": f"{error}"}, "application/json", code=404)
        return http_util.Respond(request, text, "application/json")

    return app


def _file(path: Path, kind: str, *, hours: int = 0) -> Any:
    @wrappers.Request.application
    def app(request: wrappers.Request) -> wrappers.Response:
        if not path.is_file():
            return http_util.Respond(request, "not installed", "text/plain", code=404)
        return http_util.Respond(request, path.read_bytes(), kind, expires=hours * 3600)

    return app


def _plotly() -> Path:
    found = importlib.util.find_spec("plotly")
    folder = "" if found is None or found.origin is None else os.path.dirname(found.origin)
    return Path(folder, "package_data", "plotly.min.js")
