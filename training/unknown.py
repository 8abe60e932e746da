"""What people ask that the pictures cannot answer, and what to say then: training for giving up in few words."""

from __future__ import annotations

from random import Random

UNKNOWN = "I do not know."
BLIND = "I see no image."
GREETING = "Hello! Show me an image and ask about it."
GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi!",
    "Hey",
    "Good morning",
    "Hi there",
    "Who are you?",
    "What can you do?",
    "Help",
)

LONGEST = 40  # characters: one long question pads its whole batch

_STRANGE = (
    "What is the capital of France?", "Who is the president?", "Tell me a joke.", "Write a poem about the sea.",
    "What time is it?", "How old are you?", "What is 2 + 2?", "Translate this into German.", "Why is the sky blue?",
    "Give me a recipe for bread.", "Who painted this?", "How much does it cost?", "Where was this taken?",
    "Is this a cat or a dog?", "What is the weather like today?", "Explain quantum physics.", "Sing a song.",
    "What did I ask before?", "When was this built?", "Write a Python function.", "What breed is this dog?",
    "Wie viele Sterne siehst du?", "Welche Farbe hat der Kreis?", "Was steht da?", "Wo ist das Dreieck?",
    "¿De qué color es el círculo?", "¿Cuántas estrellas hay?", "¿Qué dice el texto?",
    "Quelle est la couleur du cercle ?",
    "Combien de triangles vois-tu ?", "Que dit le texte ?", "Di che colore è il cerchio?", "Quanti triangoli ci sono?",
    "Qual é a cor do círculo?", "Hoeveel sterren zie je?", "Vilken färg har cirkeln?", "Jaki kolor ma koło?",
    "Какого цвета круг?", "Сколько звёзд на картинке?", "圆是什么颜色?", "图中有几个三角形?", "文字写的是什么?",
    "円は何色ですか?", "星はいくつありますか?", "원은 무슨 색입니까?", "별이 몇 개 있습니까?",
    "ما لون الدائرة؟", "वृत्त का रंग क्या है?",
    "Daire ne renk?", "?", "...", "!!!", "123", "ok", "asdf", "🙂", "<b>hello</b>", "\n", " ", "the the the",
)  # fmt: skip


def strange_question(random: Random) -> str:
    """One of a list, or noise: letters of any alphabet, words out of order, a character again and again."""
    draw = random.random()
    if draw < 0.55:
        return random.choice(_STRANGE)
    if draw < 0.75:
        low, high = random.choice(((32, 127), (0xC0, 0x180), (0x400, 0x460), (0x4E00, 0x5E00), (0x1F600, 0x1F640)))
        return "".join(chr(random.randrange(low, high)) for _ in range(random.randint(1, 24)))
    words = " ".join(random.sample(_STRANGE, 3)).split()
    if draw < 0.9:
        return " ".join(random.sample(words, min(len(words), random.randint(2, 9))))
    again = random.choice((random.choice(words) + " ", chr(random.randrange(33, 127))))
    return (again * random.randint(3, 30))[:LONGEST]
