"""Short English words in capitals, as signs have them, a fifth for held-out scenes; and words that mean nothing."""

from __future__ import annotations

from functools import cache
from random import Random

_WORDS = """
ACE ACID AGE AIR ALL ANT APE ARM ART ASH ATOM BABY BACK BAD BAG BAKE BALL BAND BANK BAR BAT BAY BEACH BEAN BEAR BED BEE
BELL BEST BIG BIKE BIRD BLUE BOAT BODY BOLD BOOK BOOT BOX BOY BREAD BUS BUSY BUZZ CAB CAFE CAGE CAKE CALL CAMP CAN CAP
CAR CARD CASH CAT CAVE CHEF CITY CLAY CLUB COAL COAT CODE COLD COOK COOL COPY CORN COW CUBE CUP DAD DAY DECK DEEP DEER
DESK DISH DOG DOOR DOWN DRAW DRUM DRY DUCK DUST EAR EAST EASY EGG EXIT EYE FACE FACT FARM FAST FIG FILM FIRE FISH FIVE
FLAG FLY FOG FOOD FOOT FOUR FOX FREE FROG FUN GAME GAS GATE GIFT GIRL GO GOLD GOOD GRASS GUM HAIR HALL HAND HAT HELP HEN
HERO HIGH HILL HOME HOT HOUSE ICE IDEA INK IRON JAM JAR JAZZ JET JOB JOY JUICE JUMP KEY KID KING KIT KITE LAB LAKE LAMP
LAND LEAF LEFT LEG LIFT LION LIP LOG LOVE LOW LUCK MAIL MAN MAP MARK MEAL MENU MILK MIX MOON MUD NAIL NET NEW NEXT NICE
NINE NO NOSE NOTE NOW NUT OAK OFF OIL OLD ONE OPEN OVEN OWL OX PAN PARK PEN PET PIE PIG PIN PLUM POOL POT PUSH QUEEN
QUICK QUIZ RAIN RAT RED REST RICE RING ROAD ROCK ROOM ROSE RUN SAFE SALE SALT SAND SEA SEED SHIP SHOE SHOP SIX SKY SLOW
SNOW SOAP SOFA SONG SOUP STAR STOP SUN TAXI TEA TEN TENT TIGER TIME TOP TOY TREE TRUCK TWO UP VAN VASE VET VIEW VOTE
WALK WALL WARM WAVE WAX WEB WEST WET WIFI WIN WIND WING WOLF WOOD WORK YARD YES YOGA ZEBRA ZERO ZIP ZONE ZOO
""".split()  # noqa: SIM905 - a page of words reads better

ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "sk", "st", "th", "tr", "wh")
CODAS = ("", "", *"dgklmnprstw", "ck", "ng", "nt", "rd", "st")


def made_up_word(random: Random) -> str:
    """Such as "brenol"."""
    syllables = (
        random.choice(ONSETS) + random.choice("aeiou") + random.choice(CODAS)
        for _ in range(random.choice((1, 2, 2, 3)))
    )
    return "".join(syllables)


@cache
def held_out_words() -> tuple[str, ...]:
    """Words that training never shows."""
    return tuple(_WORDS[::5])


@cache
def training_words() -> tuple[str, ...]:
    return tuple(word for word in _WORDS if word not in held_out_words())
