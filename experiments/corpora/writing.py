"""Writes random texts, and texts that are similar to others by a known amount."""

import re
from collections.abc import Sequence

import numpy as np

FUNCTION_WORDS = (
    "the of and to a in that it is was for on as with by at this had not are but from or have an "
    "they which one you were all we when there can been has would who will more no if out so "
    "said what up its about into than them only other new some could time these two may then do "
    "first any my now such like our over even most after also many before must through back "
    "where much"
).split()
ROOTS = (
    "act add age aim air answer arm art ask back band bank base bear beat bed bell bend bird "
    "bite blow board boat body bone book bow brain branch bread break bridge bright bring brush "
    "build burn butter button call camp card care cart chain chair chalk chance change cheese "
    "chief child claim class clean clear climb clock cloth cloud coal coat cold colour comfort "
    "common control cook copper copy cork cotton cough count cover cow crack credit crush cry "
    "current curtain curve damage danger dark day dear debt deep desire detail digest dirt doubt "
    "drain draw dream dress drink drive drop dry dust earth edge effect end engine error event "
    "example expand expert face fact fall farm father fear feather feel field fight finger fire "
    "fish flag flame flat flight float floor flower fly fold food force form frame friend front "
    "fruit garden gather glass glove goat gold grain grass green grey grip group grow guide "
    "hammer hand harbour hard harmony hat head heart heat help hold hook hope horse hour house "
    "humour ice ink insect iron island jelly jewel join journey judge jump kettle key kick knot "
    "land laugh lead leaf learn level lift light limit line linen liquid list lock look loss "
    "love machine map mark market mass match meal measure meat metal milk mind mine minute mist "
    "mix money month moon morning motion mountain move muscle music nail name nation need nerve "
    "net night noise note number nut offer oil open orange order owner page paint paper part "
    "paste pay peace pen pencil person picture pin pipe place plane plant plate play point "
    "polish pot powder power press price print profit protest pull pump push quiet rail rain "
    "range rate ray reach reason record regret relate rest reward rhythm rice ring river road "
    "rod roll roof room root rub rule run salt sand scale school scissors screw sea seat seed "
    "self sense shade shake shame sharp sheep shelf ship shirt shock shoe side sign silk silver "
    "sister size skin skirt sleep slip slope smash smell smile smoke smooth snake sneeze snow "
    "soap soft solid song sort sound soup space spade sponge spoon spring square stage stamp "
    "star start state station steam steel stem step stick stiff stitch stocking stomach stone "
    "stop store story street stretch structure sugar summer support swim table tail talk taste "
    "teach tend test thick thin thread throat thumb thunder ticket tight tin tooth top touch "
    "town trade train transport tray tree trick trouble true turn twist umbrella unit use value "
    "verse vessel view voice walk wall war wash waste watch water wave wax weather week weight "
    "wheel whip whistle wide wind window wine wing winter wire woman wood wool word work wound "
    "write yard year yellow young"
).split()
PREFIXES = ("", "re", "un", "over", "under", "out", "inter", "pre", "sub", "fore", "mis")
SUFFIXES = (
    *("", "s", "ed", "ing", "er", "ers", "able", "ly", "ness", "ful", "less", "ment", "ward"),
    *("like", "ship", "hood", "ish"),
)
FOREIGN = {
    "fr": (
        "le la les une des été où être élève français déjà après très même fenêtre maison hôtel "
        "garçon leçon château forêt hiver près père mère frère fête tête bête rivière lumière "
        "première dernière année journée soirée école étoile église île âme âge façon là voilà à "
        "côté théâtre musée café thé crème pâte gâteau légume différent écrire répondre préférer"
    ),
    "de": (
        "der die das und für über schön größer Straße Mädchen früh später können müssen Tür "
        "Häuser Bäume Öl übrigens natürlich Brüder Väter Mütter Töchter Äpfel Gärten Flüsse süß "
        "weiß heiß groß Fuß Gruß schließen öffnen hören gehören zählen erzählen fällt läuft wäre "
        "hätte würde nächste Woche zurück Glück Stück Brücke Küche Bücher Wörter Möbel Vögel "
        "Käse Gemüse"
    ),
    "ru": (
        "и в не на что он как это она по но они мы этот который из у то за свой весь год от так "
        "для человек дело время рука жизнь день голова друг место вода слово лицо дом страна мир "
        "город дорога работа земля новый большой последний хороший говорить знать думать видеть "
        "идти стоять сидеть понимать"
    ),
    "ja": (
        "私は 今日は 昨日は 学校へ 会社で 駅まで 友達と 先生が 子供たちは 日本語を 勉強して "
        "行きました 食べました 読んでいる 新しい本を とても面白い 天気が良い 雨が降って "
        "電車に乗って 町を歩く 映画を見て 写真を撮る 料理を作り コーヒーを飲む 朝早く起きて "
        "夜遅くまで 働いています 考えている 思います 言いました ありがとう テレビの ニュースでは "
        "東京の 京都に 海の近くで 山に登る"
    ),
    "zh": (
        "我们 今天 昨天 学校 公司 朋友 老师 孩子们 中文 学习 去了 吃饭 读书 新的书 非常有意思 "
        "天气很好 下雨了 坐火车 城市 走路 看电影 照片 做饭 喝咖啡 早上起床 晚上 工作 认为 觉得 "
        "说话 谢谢 电视 新闻 北京 上海 海边 爬山 时间 问题 国家 经济 发展 历史 文化 世界 人民 "
        "生活"
    ),
}
_WORD = re.compile(r"\w+")


class Writer:
    """Writes random texts: words by Zipf's law, in sentences and paragraphs, a paragraph a line."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        words = [p + root + s for p in PREFIXES for s in SUFFIXES for root in ROOTS]
        # The shorter ones are the more frequent ones.
        self.vocabulary = sorted(dict.fromkeys(words), key=len)
        self._content = np.cumsum(1 / np.arange(30, 30 + len(self.vocabulary)))
        self._function = np.cumsum(1 / np.arange(2, 2 + len(FUNCTION_WORDS)))

    def number(self, low: int, high: int) -> int:
        """A number, `high` not among them."""
        return int(self.rng.integers(low, high))

    def choice(self, options: Sequence):
        return options[self.number(0, len(options))]

    def rare(self) -> str:
        """A word, all of the vocabulary as likely."""
        return self.choice(self.vocabulary)

    def words(self, count: int) -> list[str]:
        points = self.rng.random(count)
        content = np.searchsorted(self._content, points * self._content[-1])
        function = np.searchsorted(self._function, points * self._function[-1])
        is_function = self.rng.random(count) < 0.42
        words = []
        for i, j, which in zip(content.tolist(), function.tolist(), is_function.tolist()):
            words.append(FUNCTION_WORDS[j] if which else self.vocabulary[i])
        return words

    def sentence(self, count: int) -> str:
        words = self.words(count)
        if count > 12:
            words[count // 2] += ","
        return " ".join(words).capitalize() + "."

    def text(self, count: int) -> str:
        """A text of about so many words."""
        lines = []
        while count > 0:
            sentences = []
            for _ in range(self.number(2, 6)):
                length = self.number(7, 23)
                sentences.append(self.sentence(length))
                count -= length
            lines.append(" ".join(sentences))
        return "\n".join(lines)

    def any_text(self) -> str:
        """A text whose length is as lengths of pages are."""
        return self.text(int(np.clip(self.rng.lognormal(5.7, 0.7), 60, 3000)))

    def foreign(self, language: str, count: int) -> str:
        """A text in another language, of at least so many words."""
        words = FOREIGN[language].split()
        is_spaced = language not in ("ja", "zh")
        sentences = []
        while count > 0:
            length = self.number(6, 15)
            count -= length
            drawn = [self.choice(words) for _ in range(length)]
            sentence = " ".join(drawn) if is_spaced else "".join(drawn)
            sentences.append(sentence.capitalize() + ("." if is_spaced else "。"))
        return (" " if is_spaced else "").join(sentences)

    def between(self, text: str, *inserted: str) -> str:
        """The text with other lines among its own."""
        lines = text.split("\n")
        for line in inserted:
            lines.insert(self.number(1, len(lines) + 1), line)
        return "\n".join(lines)


# --- near duplicates ---


def jaccard(a: str, b: str) -> float:
    """Returns the Jaccard similarity of the 5-word shingles of two texts, by plain sets."""
    sets = []
    for text in (a, b):
        words = _WORD.findall(text.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


# How many shingles go for a word that is changed, and how many come.
EDITS = {"substituted": (5, 5), "inserted": (4, 5), "deleted": (5, 4)}


def edited(text: str, edit: str, similarity: float, writer: Writer) -> str:
    """Returns a text whose similarity to the given one is about so much, by edits far apart."""
    spans = [match.span() for match in _WORD.finditer(text)]
    gone, come = EDITS[edit]
    count = round((len(spans) - 4) * (1 - similarity) / (gone + come * similarity))
    segment = len(spans) // count
    parts = []
    end = 0
    for number in range(count):
        begin, after = spans[number * segment + writer.number(5, segment - 4)]
        parts.append(text[end : after if edit == "inserted" else begin])
        if edit == "inserted":
            parts.append(" ")
        if edit != "deleted":
            parts.append(writer.rare())
        end = after
    return "".join([*parts, text[end:]])


def restyled(text: str) -> str:
    """Returns a text of the same words in other clothes."""
    return re.sub(r"[.,\n]", " ", text).upper()


def survivors(texts: Sequence[str], threshold: float = 0.8) -> set[int]:
    """Returns which of some texts stay, in their order: none is similar to one that stays."""
    kept: list[int] = []
    for number, text in enumerate(texts):
        if all(jaccard(text, texts[other]) < threshold for other in kept):
            kept.append(number)
    return set(kept)
