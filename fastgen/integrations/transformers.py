"""Models of Hugging Face transformers (>= 5).

Their attention layers look up a function by the name in their config, ``config._attn_implementation``, in a registry,
``transformers.AttentionInterface``; masks have a second one, ``AttentionMaskInterface``. Importing this module
registers the name "fastgen" in both, for the process; a model's config selects it. Models that share a config object
share its choice, as with ``PreTrainedModel.set_attn_implementation``.

A model that was accelerated has the attribute ``_fastgen_attention`` with the previous names. It is copied by deepcopy
and pickle, removed by ``restore``, and is part neither of the state dict nor of ``config.json``.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from fastgen.integrations._transformers_attention import ARGUMENTS, attention, attention_mask
from fastgen.integrations.modules import AccelerationReport, named_modules

_NAME = "fastgen"
_MARK = "_fastgen_attention"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"

_WITHOUT_SDPA = frozenset({"gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "vaultgemma"})
"""Types of models that refuse "sdpa" and take this function: it has their softcap or sinks, and they take its masks."""


def register() -> None:
    """Registers the name "fastgen" for ``attn_implementation``, in this process."""
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, attention_mask)


register()


@dataclass(frozen=True, eq=False)
class _Record:
    """What ``restore`` sets: configs, and the implementation of each before."""

    previous: list[tuple[PreTrainedConfig, str | None]]


# --------------------------------------------------------------------------------------------------
# Attention layers


def _class(module: nn.Module) -> Any:
    """The class, as an argument of cached functions, which mypy refuses as a type[Module]."""
    return type(module)


@cache
def _functions(cls: Any) -> tuple[FunctionType, ...]:
    """The methods that a class and its bases define, without torch's."""
    bases = [base for base in cls.__mro__ if not base.__module__.startswith("torch.") and base is not object]
    methods = [inspect.unwrap(item) for base in bases for item in vars(base).values() if callable(item)]
    return tuple(method for method in methods if isinstance(method, FunctionType))


@cache
def _looks_up(cls: Any) -> bool:
    """Whether layers of a class take their attention function from the registry."""
    own = not issubclass(cls, PreTrainedModel)  # whose methods check names
    return own and any(_REGISTRY in function.__code__.co_names for function in _functions(cls))


@cache
def _calls(cls: Any) -> tuple[ast.Call, ...]:
    """The calls of the function that was looked up.

    Raises:
        OSError: the source is not available.
    """
    calls: list[ast.Call] = []
    for function in _functions(cls):
        if _REGISTRY not in function.__code__.co_names:
            continue
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
        found = set()
        for node in nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(part, ast.Name) and part.id == _REGISTRY for part in ast.walk(node.value)):
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
        calls += [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in found]
    return tuple(calls)


def _keywords(cls: Any) -> dict[str, ast.expr]:
    return {word.arg: word.value for call in _calls(cls) for word in call.keywords if word.arg is not None}


def _is_other_attention(module: nn.Module) -> bool:
    """Whether a layer computes attention without the registry: its name says so, and it contains no such layer."""
    return _has_name_of_attention(module) and not any(
        _has_name_of_attention(part) or isinstance(part, nn.MultiheadAttention)
        for part in module.modules()
        if part is not module
    )


def _has_name_of_attention(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__module__.startswith(("torch.", "fastgen.")) or isinstance(module, PreTrainedModel):
        return False
    part = re.search("(Output|MLP|Structure|Projection|Norm)$", cls.__name__)
    return part is None and re.search("Attention|Attn", cls.__name__) is not None


def _reason_unfit(module: nn.Module, owner: PreTrainedModel) -> str | None:
    """Reason why a layer that looks up its function cannot take fastgen's; None if it can."""
    cls = _class(module)
    try:
        unknown = sorted(_keywords(cls).keys() - ARGUMENTS)
    except OSError:
        return f"{cls.__name__}: its source is not available, so that its arguments are not known"
    if unknown:
        return f"{cls.__name__} passes {', '.join(unknown)} to its attention function, which fastgen's does not have"
    for function in _functions(cls):
        registry = function.__globals__.get(_REGISTRY)
        if "sdpa" in getattr(registry, "_local_mapping", ()):
            return f"{cls.__name__} has attention functions of its own"
    if not getattr(owner, "_supports_sdpa", False) and owner.config.model_type not in _WITHOUT_SDPA:
        return f"{type(owner).__name__} does not support sdpa, and has not been tested with fastgen's function"
    return None


# --------------------------------------------------------------------------------------------------
# Configs


def _configs(module: nn.Module) -> Iterator[PreTrainedConfig]:
    """The config of a layer, and its sub-configs."""
    stack = [vars(module).get("config")]
    while stack:
        config = stack.pop()
        if isinstance(config, PreTrainedConfig):
            yield config
            stack += [getattr(config, name, None) for name in config.sub_configs]


def _config_of(module: nn.Module, owner: PreTrainedModel) -> PreTrainedConfig:
    config = vars(module).get("config")
    return config if isinstance(config, PreTrainedConfig) else owner.config


@dataclass(frozen=True, eq=False)
class _Layer:
    """An attention layer, with the innermost transformers model that it is in."""

    name: str
    module: nn.Module
    owner: PreTrainedModel
    compiled: bool

    @property
    def config(self) -> PreTrainedConfig:
        return _config_of(self.module, self.owner)


def _layers(model: nn.Module) -> Iterator[tuple[_Layer | None, str, nn.Module]]:
    """Attention layers under each of their names; without a ``_Layer`` where no transformers model contains them."""
    owners: dict[str, PreTrainedModel] = {}
    for name, module, compiled in named_modules(model):
        path = "" if name == "(model)" else name
        parent = owners.get(path.rpartition(".")[0]) if path else None
        owner = module if isinstance(module, PreTrainedModel) else parent
        if owner is not None:
            owners[path] = owner
        if _looks_up(_class(module)) or _is_other_attention(module):
            if owner is not None and owner is not module:
                yield _Layer(name, module, owner, compiled), name, module
            elif owner is None and type(module).__module__.startswith("transformers."):
                yield None, name, module


# --------------------------------------------------------------------------------------------------
# accelerate and restore


def recognizes(model: nn.Module) -> bool:
    return any(
        type(part).__module__.startswith("transformers.") or isinstance(part, PreTrainedModel)
        for part in model.modules()
    )


def accelerate(model: nn.Module) -> AccelerationReport:
    """Selects fastgen's attention in the configs of the transformers models in ``model``."""
    kept: dict[str, str] = {}
    layers: list[_Layer] = []
    for layer, name, module in _layers(model):
        if layer is None:
            kept[name] = f"{type(module).__name__} takes its function from its model's config: accelerate that model"
        else:
            layers.append(layer)
    blocked: dict[int, str] = {}
    for layer in layers:
        reason = _reason_kept(layer)
        if reason is not None:
            kept[layer.name] = reason
            if _blocks(layer):
                blocked.setdefault(id(layer.config), f"shares its config with {layer.name}, which is kept")
    replaced: dict[str, str] = {}
    switched: dict[int, tuple[PreTrainedConfig, str | None]] = {}
    for layer in layers:
        if layer.name in kept:
            continue
        if id(layer.config) in blocked:
            kept[layer.name] = blocked[id(layer.config)]
            continue
        switched[id(layer.config)] = (layer.config, layer.config._attn_implementation)
        replaced[layer.name] = _text(layer)
    _switch(model, switched, set(blocked))
    return AccelerationReport(replaced, kept)


def _reason_kept(layer: _Layer) -> str | None:
    cls = _class(layer.module)
    if not _looks_up(cls):
        return f"{cls.__name__} computes attention itself, without transformers.AttentionInterface"
    if layer.config._attn_implementation == _NAME:
        if any(config is layer.config for config, _ in _record(layer.owner)):
            return f"already accelerated: {cls.__name__}"
        return f'constructed with attn_implementation="{_NAME}"'
    return _reason_unfit(layer.module, layer.owner)


def _blocks(layer: _Layer) -> bool:
    """Whether a kept layer keeps those that share its config: it would get masks that it does not take."""
    if layer.config._attn_implementation == _NAME:
        return False
    return _looks_up(_class(layer.module)) or layer.config._attn_implementation != "sdpa"


def _text(layer: _Layer) -> str:
    before = layer.config._attn_implementation or "eager"
    text = f"{type(layer.module).__name__}: {before} -> {_NAME}"
    return text + (", recompiled at its next call" if layer.compiled else "")


def _switch(model: nn.Module, switched: dict[int, tuple[PreTrainedConfig, str | None]], blocked: set[int]) -> None:
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    taken = set(switched)
    for part in models:
        # Masks may be made from the config of a composite model, or from its copy of the config of a part.
        within = {id(config) for child in part.modules() for config in _configs(child)}
        if within & taken and not within & blocked:
            for config in _configs(part):
                switched.setdefault(id(config), (config, config._attn_implementation))
    switched = {key: entry for key, entry in switched.items() if entry[1] != _NAME}
    for part in models:
        entries = [switched[id(config)] for config in _configs(part) if id(config) in switched]
        if entries:
            vars(part)[_MARK] = _Record(_record(part) + entries)
    for config, _ in switched.values():
        config._attn_implementation_internal = _NAME


def _record(model: nn.Module) -> list[tuple[PreTrainedConfig, str | None]]:
    record = vars(model).get(_MARK)
    return record.previous if isinstance(record, _Record) else []


def restore(model: nn.Module) -> AccelerationReport:
    """Reverts ``accelerate``: selects the previous attention, unless another one was selected since."""
    previous: dict[int, tuple[PreTrainedConfig, str | None]] = {}
    for part in model.modules():
        for config, implementation in _record(part):
            if config._attn_implementation == _NAME:
                previous[id(config)] = (config, implementation)
        vars(part).pop(_MARK, None)
    replaced = {}
    for layer, name, module in _layers(model):
        if layer is not None and id(layer.config) in previous and _looks_up(_class(module)):
            replaced[name] = f"{type(module).__name__}: {_NAME} -> {previous[id(layer.config)][1] or 'eager'}"
    for config, implementation in previous.values():
        config._attn_implementation_internal = implementation
    return AccelerationReport(replaced, {})


def check_restore(model: nn.Module) -> None:
    """``restore`` does not raise."""
