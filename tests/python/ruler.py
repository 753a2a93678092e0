"""RULER's prompts written a second time, from its published templates and parameters: what `compact eval ruler --prompts` must
write, byte for byte. Only the draws are ours, and they are defined here once more: SplitMix64 over an FNV-1a hash of a name."""

import math
import re

WORD = 2**64
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# RULER's templates, with its fields.
NIAH = ("Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "{type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided "
        "text?")
NIAH_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
VT = ("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables "
      "that are assigned the value {query} in the text above.")
VT_PREFIX = (" Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value "
             "{query}, they are: ")
CWE = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
       "often.\n{context}\nQuestion: What are the 10 most common words in the above list?")
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE = ("Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
       "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
       "words in the above coded text?")
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
QA = ("Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are "
      "given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any "
      "other words.\n\nQuestion: {query}")
QA_PREFIX = " Answer:"
DOCUMENT = "Document {i}:\n{document}"

# haystack, keys, values, keys in the text, values of a key, keys asked for; tokens to generate
NIAH_TASKS = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
GENERATE = {**{name: 128 for name in NIAH_TASKS}, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


class Stream:
    def __init__(self, name):
        self.state = 0xCBF29CE484222325
        for byte in name.encode():
            self.state = (self.state ^ byte) * 0x100000001B3 % WORD

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) % WORD
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
        return z ^ z >> 31

    def below(self, n):
        return self.next() * n // WORD

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items):
        items = list(items)
        for last in reversed(range(1, len(items))):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def sample(self, n, count):
        if 2 * count > n:
            return self.shuffled(range(n))[:count]
        drawn = {}
        while len(drawn) < count:
            drawn[self.below(n)] = None
        return list(drawn)


def split_sentences(words):
    """Lists of words, a sentence each. A word ends one if it closes with . ? or !, is neither title nor initial, and what follows does
    not begin in lower case; the last word always does. The prose repeats, so its first word follows its last."""
    titles = re.compile(r"(mr|mrs|ms|dr|st|prof|vs|etc|jr|capt|col|gen|e\.g|i\.e|cf)\.", re.IGNORECASE)
    sentences = [[]]
    for word, after in zip(words, [*words[1:], words[0]]):
        sentences[-1].append(word)
        bare = word.lstrip("\"'([{").rstrip("\"')]}")
        ends = bare.endswith(("?", "!")) or (bare.endswith(".") and not titles.fullmatch(bare) and not re.fullmatch(r"[A-HJ-Z]\.", bare))
        if ends and not after[0].islower():
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


class Ruler:
    """count_tokens(text) -> tokens of a text without special tokens; prose, words: what the run got as --essays and --words;
    questions: of --qa-1 and --qa-2, as read_squad and read_hotpot return them."""

    def __init__(self, prose, words, count_tokens, seed=42, questions=()):
        self.prose = re.findall(r"[^ \t\n\v\f\r]+", prose)
        self.sentences = split_sentences(self.prose)
        self.words, self.count_tokens, self.seed, self.questions = words, count_tokens, seed, dict(questions)
        self.example_lines = None  # of vt

    def build(self, task, tokens, index, units):
        """-> prompt, answer prefix, answers"""
        stream = lambda purpose: Stream(f"{self.seed}/{task}/{tokens}/{index}/{purpose}")
        if task == "vt":
            return self.variable_tracking(stream, units)
        if task == "cwe":
            return self.common_words(stream, tokens, units)
        if task == "fwe":
            return self.frequent_words(stream, tokens, units)
        if task in self.questions:
            return self.question(stream, units, index, *self.questions[task])
        return self.needle_in_a_haystack(stream, units, *NIAH_TASKS[task])

    # ---- niah
    def value(self, kind, stream):
        if kind == "numbers":
            return str(1000000 + stream.below(9000000))
        if kind == "words":
            return stream.pick(self.words) + "-" + stream.pick(self.words)
        text = f"{stream.next():016x}{stream.next():016x}"
        variant = "89ab"[int(text[16], 16) % 4]
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"

    def new_value(self, kind, stream, taken):
        while True:
            value = self.value(kind, stream)
            if value not in taken:
                return value

    def needle_in_a_haystack(self, stream, units, haystack, key_kind, kind, num_keys, values_per_key, num_asked):
        draws = stream("needles")
        table = {}
        for _ in range(num_keys):
            values = table[self.new_value(key_kind, draws, table)] = []
            for _ in range(values_per_key):
                values.append(self.new_value(kind, draws, values))
        needle = lambda key, value: NEEDLE.format(type_needle_v=kind, key=key, value=value)
        needles = draws.shuffled([needle(key, value) for key, values in table.items() for value in values])
        asked = [list(table)[i] for i in draws.sample(num_keys, num_asked)]
        if haystack == "essay":
            context = self.essay(units, needles, draws)
        else:
            lines = [NOISE] * units
            if haystack == "needle":
                others = stream("lines")
                lines = [needle(self.value(key_kind, others), self.value(kind, others)) for _ in range(units)]
            for place, text in sorted(zip(sorted(draws.sample(units, len(needles))), needles), reverse=True):
                lines.insert(place, text)
            context = "\n".join(lines)
        template, prefix = NIAH, NIAH_PREFIX
        if num_asked * values_per_key == 1:
            template, prefix = (text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (template, prefix))
            kind = kind[:-1]
        query = asked[0] if num_asked == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        fields = {"type_needle_v": kind, "context": context, "query": query}
        return template.format(**fields), prefix.format(**fields), [value for key in asked for value in table[key]]

    def essay(self, units, needles, draws):
        sentences, left = [], units
        while left > 0:
            for sentence in self.sentences:
                if left > 0:
                    sentences.append(" ".join(sentence[:left]))
                    left -= len(sentence)
        depths = [round(100 * i / 39) for i in range(40)]
        places = sorted(len(sentences) * depths[i] // 100 for i in draws.sample(40, len(needles)))
        for place, needle in reversed(list(zip(places, needles))):
            sentences.insert(place, needle)
        return " ".join(sentences)

    # ---- vt
    def chain_problem(self, stream, letters, num_lines):
        names = []
        while len(names) < 5:
            name = "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[stream.below(26)] for _ in range(letters))
            if name not in names:
                names.append(name)
        value = str(10000 + stream.below(89999))
        chain = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:])]
        lines = [NOISE] * num_lines
        for place, text in reversed(list(zip(sorted(stream.sample(num_lines, 5)), chain))):
            lines.insert(place, text)
        fields = {"context": "\n".join(lines), "query": value, "num_v": 5}
        return VT.format(**fields), VT_PREFIX.format(**fields), names

    def variable_tracking(self, stream, units):
        if self.example_lines is None:
            self.example_lines = 5
            while self.count_tokens("".join(self.chain_problem(Stream("vt/example/size"), 3, self.example_lines + 1)[:2])) <= 500:
                self.example_lines += 1
        question, prefix, names = self.chain_problem(stream("example"), 3, self.example_lines)
        example = question + prefix + " " + " ".join(names) + "\n"
        prompt, prefix, names = self.chain_problem(stream("chain"), 5, units)
        return example + "\n" + prompt, prefix, names

    # ---- cwe
    def word_list(self, draws, num_words, common_repeats, other_repeats):
        vocabulary = sorted(set(self.words))
        words = [vocabulary[i] for i in draws.sample(len(vocabulary), num_words)]
        common, others = words[:10], words[10:]
        repeated = [word for word in common for _ in range(common_repeats)] + [word for word in others for _ in range(other_repeats)]
        return CWE.format(context=numbered(draws.shuffled(repeated))), common

    def common_words(self, stream, tokens, units):
        example_shape, shape = ((20, 3, 1), (6, 1)) if tokens < 4096 else ((40, 10, 3), (30, 3))
        example, common = self.word_list(stream("example"), *example_shape)
        prompt, answers = self.word_list(stream("words"), units, *shape)
        return example + CWE_PREFIX + " " + numbered(common) + "\n" + prompt, CWE_PREFIX, answers

    # ---- fwe
    def frequent_words(self, stream, tokens, units):
        draws, vocabulary = stream("vocabulary"), {"...": None}
        while len(vocabulary) < (tokens - 50) // 50:
            vocabulary["".join("abcdefghijklmnopqrstuvwxyz"[draws.below(26)] for _ in range(6))] = None
        text = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(units / k**2 / (math.pi**2 / 6)))]
        return FWE.format(context=" ".join(stream("text").shuffled(text))), FWE_PREFIX, list(vocabulary)[1:4]

    # ---- qa
    def question(self, stream, units, index, questions, documents):
        query, answers, own, related = questions[index]
        draws = stream("documents")
        if units >= len(documents):
            chosen = [i % len(documents) for i in range(units)]
        else:
            chosen = list(own)
            chosen += [related[i] for i in draws.sample(len(related), min(len(related), max(0, units - len(chosen))))]
            others = [i for i in range(len(documents)) if i not in chosen]
            chosen += [others[i] for i in draws.sample(len(others), max(0, units - len(chosen)))]
        chosen = draws.shuffled(chosen)
        context = "\n\n".join(DOCUMENT.format(i=i + 1, document=documents[d]) for i, d in enumerate(chosen))
        return QA.format(context=context, query=query), QA_PREFIX, answers


def numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def read_squad(data):
    """-> [(question, answers, own documents, others of the article)], documents"""
    documents = sorted({paragraph["context"] for article in data["data"] for paragraph in article["paragraphs"]},
                       key=lambda text: text.encode())
    questions = []
    for article in data["data"]:
        of_article = sorted({documents.index(paragraph["context"]) for paragraph in article["paragraphs"]})
        for paragraph in article["paragraphs"]:
            own = documents.index(paragraph["context"])
            questions += [(qa["question"], [answer["text"] for answer in qa["answers"]], [own], [i for i in of_article if i != own])
                          for qa in paragraph["qas"] if not qa["is_impossible"]]
    return questions, documents


def read_hotpot(data):
    text = lambda title, sentences: title + "\n" + "".join(sentences)
    documents = sorted({text(*pair) for entry in data for pair in entry["context"]}, key=lambda text: text.encode())
    return [(entry["question"], [entry["answer"]], [documents.index(text(*pair)) for pair in entry["context"]], [])
            for entry in data], documents
