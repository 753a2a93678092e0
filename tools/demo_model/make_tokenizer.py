"""Trains the demo's byte-level BPE tokenizer and writes tokenizer.json and tokenizer_config.json.

Layout as in Llama 3 (Split by regex, then ByteLevel), so that any reader of that family loads it. One difference: a
number takes its leading space (` ?\\p{N}{1,3}`), hence the first token of an answer already carries digits and
the answer is found by the last row of prefill, not by the first decode step.
"""

import argparse
import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The wording of the tasks has to be in the vocabulary as whole words, whatever the prose says.
TASK_TEXT = (
    "Some special magic numbers words uuids are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\nOne of the special magic numbers for it is: A special magic word. uuid. "
    "What are all the special magic numbers for mentioned in the provided text? The special magic number for mentioned in "
    "the provided text is\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n Question: Find all variables "
    "that are assigned the value in the text above. Answer: According to the chain(s) of variable assignment in the text "
    "above, 5 variables are assigned the value, they are: VAR =\n"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--vocab", type=int, default=6144)
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE(byte_fallback=False, ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every number of one to three digits, with and without space, is one token: values then split the same way always.
    numbers = [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)]
    number_text = "\n".join(number + " " + number for number in numbers)
    words = (args.corpus / "words.txt").read_text()
    texts = [(args.corpus / "train.txt").read_text(), words.replace("\n", " "), words.replace("\n", "-")]
    texts += [TASK_TEXT] * 400 + [number_text] * 300
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
        ),
    ])

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    missing = [n for n in numbers if len(tokenizer.encode(" " + n, add_special_tokens=False).ids) != 1]
    print("vocabulary", tokenizer.get_vocab_size(), "numbers that are not one token:", len(missing))


if __name__ == "__main__":
    main()
