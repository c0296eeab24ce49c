"""The words of the grammar. No word stands in two lists, so that each says what it is."""

NAMES = (
    "Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon", "Kim", "Leo",
    "Mia", "Noa", "Ola", "Pia", "Rex", "Sam", "Tom", "Una", "Vic", "Wim", "Yan", "Zoe",
)  # fmt: skip

THINGS = (
    "ball", "kite", "cup", "hat", "book", "key", "coat", "drum", "lamp", "bell", "shoe", "doll",
    "ring", "cake", "pear", "rope", "coin", "map", "flute", "spoon",
)  # fmt: skip

COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "gray")

PLACES = ("box", "bag", "barn", "shed", "tent", "desk", "cave", "boat", "hall", "well")

NUMBERS = ("one", "two", "three", "four", "five")
