"""Writes a GGUF model once more in other types: python tests/requantize.py IN.gguf OUT.gguf PRESET.

From weights that are quantized already, so the result is a little worse than the same preset made from floats.
"""

import sys

import gguf
import numpy as np

from ms4.models import convert
from ms4.quant.blocks import dequantize
from ms4.quant.gguf_file import GgufFile
from ms4.quant.safetensors_file import Stored


def requantize(source, out, preset):
    file, reader = GgufFile.open(source), gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(None, file.metadata["general.architecture"])
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.size_label"):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
    data = np.memmap(source, np.uint8, "r")
    n_layer = file.metadata["mistral4.block_count"]
    items = []
    for name, tensor in file.tensors.items():
        dims = tuple(int(d) for d in tensor.dims if d > 1) or (1,)
        parts = name.removesuffix(".weight").split(".")
        layer = int(parts[1]) if parts[0] == "blk" else -1
        kind = convert.type_of(convert.PRESETS[preset], parts[-1], dims, layer, n_layer)
        values = dequantize(data[tensor.offset : tensor.offset + tensor.bytes], tensor.type, tensor.n_weights)
        items.append(convert.Item(name, kind, Stored("F32", values.reshape(dims[::-1]))))
    convert.Plan(writer, items).write(str(out), convert.check_text, lambda *done: None)


if __name__ == "__main__":
    requantize(*sys.argv[1:])
