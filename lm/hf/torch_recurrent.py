"""The weights of torch.nn's RNN, LSTM and GRU, and of an embedding and a head around them, from and
to state dicts: name -> array.

torch.nn has two biases for each gate, whose sum counts; we have one. A state dict that is read has
them added, and one that is written has zeros in `bias_ih`, but for the candidate of a GRU, whose
reset gate comes between the two.

Letters: G gates, H units.
"""

from collections.abc import Mapping

import numpy as np

from lm.models.recurrent import CELLS, Config


def _names(layer: int) -> tuple[str, str, str, str]:
    return tuple(
        f"{kind}_{source}_l{layer}" for kind in ("weight", "bias") for source in ("ih", "hh")
    )


def read_cells(state_dict: Mapping[str, np.ndarray], config: Config) -> dict:
    """The parameters `layers` of a model, out of the state dict of a torch.nn.RNN, LSTM or GRU.

    No array says in which order the gates stand: that of torch.nn is taken for granted.

    Args:
      config: of the model; it says which cell the weights are of, and their sizes.

    Raises:
      ValueError: an array is missing, unknown (those of another direction, or a projection), or of
        another shape, as those of another cell are.
    """
    gates = CELLS[config.cell].num_gates
    wanted = {}
    for number, (inputs, units) in enumerate(config.sizes):
        rows = gates * units
        shapes = ((rows, inputs), (rows, units), (rows,), (rows,))
        wanted |= dict(zip(_names(number), shapes))
    _check(state_dict, wanted, f"torch.nn's {config.cell} of {config.sizes} inputs and units")

    layers = {}
    for number, (_, units) in enumerate(config.sizes):
        arrays = [np.asarray(state_dict[name], np.float32) for name in _names(number)]
        from_inputs, from_state, in_bias, state_bias = (
            array.reshape(gates, units, *array.shape[1:]) for array in arrays
        )
        layer = dict(
            input_weight=from_inputs.transpose(2, 0, 1),
            state_weight=from_state.transpose(2, 0, 1),
            bias=in_bias + state_bias,
        )
        if config.cell == "gru":
            layer["bias"][-1] = in_bias[-1]
            layer["candidate_bias"] = state_bias[-1]
        layers[number] = layer
    return layers


def write_cells(layers: Mapping, config: Config) -> dict[str, np.ndarray]:
    """The state dict of a torch.nn.RNN, LSTM or GRU, out of the parameters `layers`; in f32."""
    state_dict = {}
    for number, (inputs, units) in enumerate(config.sizes):
        layer = {name: np.asarray(value, np.float32) for name, value in layers[number].items()}
        state_bias = layer["bias"].copy()
        in_bias = np.zeros_like(state_bias)
        if config.cell == "gru":
            in_bias[-1] = layer["bias"][-1]
            state_bias[-1] = layer["candidate_bias"]
        arrays = (
            layer["input_weight"].transpose(1, 2, 0).reshape(-1, inputs),
            layer["state_weight"].transpose(1, 2, 0).reshape(-1, units),
            in_bias.reshape(-1),
            state_bias.reshape(-1),
        )
        state_dict |= dict(zip(_names(number), arrays))
    return state_dict


def _check(state_dict: Mapping, wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    missing = sorted(wanted.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"the state dict lacks {missing}, and has {unknown}, which is not known; wanted those "
            f"of {what}"
        )
    for name, shape in wanted.items():
        found = tuple(np.shape(state_dict[name]))
        if found != shape:
            raise ValueError(f"the state dict's {name} is {found}; wanted {shape}, those of {what}")
