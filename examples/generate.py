"""Have a causal model go on with a text, as any transformers user would: what frodctl merged is an ordinary checkpoint.

python examples/generate.py merged "Return the"
"""

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    ids = model.generate(
        **tokenizer(arguments.text, return_tensors="pt"), max_new_tokens=arguments.tokens, do_sample=False
    )
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()
