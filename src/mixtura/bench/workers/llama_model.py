"""llama.cpp, through llama-cpp-python's low-level functions: prompts, and decode steps with tokens that are given."""

import ctypes
import os

import llama_cpp as lib
import numpy as np
from loop import serve

_BFLOAT16 = 30  # in ggml's list of types
_SILENT = lib.llama_log_callback(lambda level, text, data: None)


class Model:
    """A model with as many sequences as a case asks for."""

    def __init__(self):
        lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.path = self.model = self.context = None
        self.calls = {}

    def load(self, path, threads, bits):
        """Read the file, which holds 16 bits, quantized if fewer are asked for."""
        self._free()
        path = path if bits == 16 else quantized(path, threads, bits)
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.threads, self.path = threads, path
        self.model = lib.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise ValueError("llama.cpp cannot read the file")
        return {"versions": {"llama-cpp-python": lib.__version__}}

    def decode(self, prompts, following):
        """Read the prompts (B, L); a run is a step of ``following`` (N, B)."""
        self._context(len(prompts), len(prompts[0]) + len(following))
        self.length, self.following, self.place = len(prompts[0]), following, 0
        for row, prompt in enumerate(prompts):
            self._read(prompt, row)
        self.calls = {"llama.cpp": self._step}
        return {"who": list(self.calls)}

    def prefill(self, prompts):
        """A run reads the prompt (1, L)."""
        self._context(1, len(prompts[0]))
        self.calls = {"llama.cpp": lambda: self._prompt(prompts[0])}
        return {"who": list(self.calls)}

    def before(self, who):
        """Forget what the steps before added."""
        if who == "llama.cpp" and self.calls[who] == self._step:
            self.place = 0
            for row in range(self.rows):
                lib.llama_memory_seq_rm(lib.llama_get_memory(self.context), row, self.length, -1)

    def output(self, who, path):
        """Write the logits of the first step, or of the end of the prompt."""
        self.before(who)
        self.calls[who]()
        rows = range(self.rows) if self.rows > 1 else (-1,)
        np.save(path, np.stack([self._logits(row) for row in rows]))

    def _prompt(self, prompt):
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        self._read(prompt, 0)

    def _read(self, prompt, row):
        for start in range(0, len(prompt), 512):
            part = prompt[start : start + 512]
            self._run([(token, start + n, row, start + n + 1 == len(prompt)) for n, token in enumerate(part)])

    def _step(self):
        tokens = self.following[self.place % len(self.following)]
        self._run([(token, self.length + self.place, row, True) for row, token in enumerate(tokens)])
        self.place += 1

    def _run(self, entries):
        """Tokens with position, sequence, and whether logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for n, (token, position, row, wanted) in enumerate(entries):
            batch.token[n], batch.pos[n], batch.logits[n] = token, position, wanted
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
        if lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(self.context)
        if entries[-1][-1]:
            self._logits(-1)

    def _logits(self, row):
        vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, row), shape=(vocabulary,))

    def _context(self, rows, length):
        self._free(model=False)
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max = rows * (-(-length // 256) * 256), rows
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = self.threads
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError("llama.cpp cannot make a context of that size")
        self.batch, self.rows = lib.llama_batch_init(512, 0, 1), rows

    def _free(self, model=True):
        if self.context:
            lib.llama_batch_free(self.batch)
            lib.llama_free(self.context)
            self.context = None
        if model and self.model:
            lib.llama_model_free(self.model)
            self.model = None


def quantized(path, threads, bits):
    """A file of Q8_0 or Q4_0 in its place: every matrix, that of the output too, but for routers and embeddings."""
    kind, whole = {
        8: (lib.GGML_TYPE_Q8_0, lib.LLAMA_FTYPE_MOSTLY_Q8_0),
        4: (lib.GGML_TYPE_Q4_0, lib.LLAMA_FTYPE_MOSTLY_Q4_0),
    }[bits]
    options = lib.llama_model_quantize_default_params()
    options.nthread, options.ftype, options.pure = threads, whole, True
    options.output_tensor_type, options.token_embedding_type = kind, _BFLOAT16
    made = f"{path}.{bits}"
    if lib.llama_model_quantize(path.encode(), made.encode(), ctypes.byref(options)):
        raise RuntimeError("llama_model_quantize failed")
    os.remove(path)
    return made


serve(Model())
