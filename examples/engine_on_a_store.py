"""Ask a store that `prag run` has filled: `python examples/engine_on_a_store.py config.yaml "Who …?"`."""

import sys

from prag_core.config_file import load_config
from prag_core.inference.engine import open_engine
from prag_core.inference.request import Request
from prag_core.store.objects import open_store

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    engine = open_engine(open_store(config), config)
    for reply in engine.answer_batch([Request(question) for question in sys.argv[2:]]):
        print(reply.text, [passage.title for passage in reply.passages])
