"""What a model is calibrated on: one list of calls of the model, made of whatever the caller has."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """One call of a module, and how much each of its tokens counts."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    token_weights: Tensor | None = None
    """floating point, integer or bool [batch, tokens]; None: all count 1"""

    def get(self, place: int | str) -> Any:
        """Return the argument at a position or of a name; None if there is none."""
        if isinstance(place, str):
            return self.kwargs.get(place)
        return self.args[place] if place < len(self.args) else None

    def replaced(self, place: int | str, value: Any) -> "Call":
        """Return the call with another value for one argument."""
        if isinstance(place, str):
            return Call(self.args, {**self.kwargs, place: value}, self.token_weights)
        return Call((*self.args[:place], value, *self.args[place + 1 :]), self.kwargs, self.token_weights)

    def places(self) -> list[int | str]:
        """Return all positions and names."""
        return [*range(len(self.args)), *self.kwargs]

    def run(self, module: Callable[..., Any]) -> Any:
        """Call the module with copies of the arguments, which it may change in place."""
        return module(*copied(self.args), **copied(self.kwargs))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return value with function applied to the tensors in it, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    if type(value) is dict:
        return {name: map_tensors(item, function) for name, item in value.items()}
    return value


def is_cache(value: Any) -> bool:
    """Return whether a value is a transformers Cache, which a forward fills."""
    return hasattr(value, "get_seq_length")


def copied(value: Any) -> Any:
    """Return value with copies of its tensors, and of a transformers Cache."""
    if is_cache(value):
        return copy.deepcopy(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(copied(item) for item in value)
    if type(value) is dict:
        return {name: copied(item) for name, item in value.items()}
    return map_tensors(value, torch.clone)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, also those in tuples, lists and dicts."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(dict(value) if isinstance(value, Mapping) else value, note)
    return found


def is_plain(value: Any) -> bool:
    """Return whether a value is a tensor that notes changes in place, None, or a tuple of such."""
    if isinstance(value, Tensor):
        return not value.is_inference()
    return value is None or (type(value) is tuple and all(is_plain(item) for item in value))


def _call_of(item: Any, tokenizer: Callable[..., Any] | None) -> Call:
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError("calibration holds text, which needs a tokenizer: pass tokenizer=")
        item = tokenizer(item, return_tensors="pt")
    if isinstance(item, Tensor):
        return Call((item,))
    if isinstance(item, Mapping):
        kwargs = dict(item)
        weights = kwargs.pop("token_weights", None)
        if weights is None:
            mask = kwargs.get("attention_mask")
            weights = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return Call((), kwargs, weights)
    if isinstance(item, (tuple, list)):
        return Call(tuple(item))
    raise TypeError(f"calibration must hold str, tensors, dicts or tuples of arguments, got {type(item).__name__}")


def calls_of(
    calibration: Iterable[Any] | None, tokenizer: Callable[..., Any] | None, device: torch.device
) -> list[Call]:
    """Return the calls of the model that a calibration set stands for, their tensors on the device.

    Args:
        calibration: an iterable, such as a list or a DataLoader, of str (given to the tokenizer), tensors (the model's
            first argument), dicts (arguments by name; a two-dimensional attention_mask, or else token_weights, says how
            much each token counts) or tuples (arguments by position); or a single str, tensor or dict. None: nothing.
        tokenizer: called as tokenizer(text, return_tensors="pt"); returns a dict.
        device: of the model.

    Raises:
        ValueError: text without a tokenizer.
        TypeError: something else in the iterable.
    """
    if calibration is None:
        return []
    if isinstance(calibration, (str, Tensor, Mapping)):
        calibration = [calibration]
    calls = [_call_of(item, tokenizer) for item in calibration]

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device)

    return [Call(map_tensors(c.args, move), map_tensors(c.kwargs, move), c.token_weights) for c in calls]
