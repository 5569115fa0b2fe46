"""Words that may stand behind a number without changing it. A closed list: "18 million", "5 squared", "3 pi" and
"4 or more" are other values, and no list of such words is ever complete."""

_MEASURES = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "dm": "dm decimeter decimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yard",
    "mile": "mi mile",
    "mg": "mg milligram",
    "g": "g gm gram gramme",
    "kg": "kg kilo kilogram kilogramme",
    "ounce": "oz ounce",
    "pound": "lb lbs pound",
    "ton": "ton tonne",
    "ml": "ml milliliter millilitre",
    "cl": "cl centiliter centilitre",
    "liter": "l L liter litre",
    "pint": "pt pint",
    "quart": "qt quart",
    "gallon": "gal gallon",
    "ms": "ms millisecond",
    "second": "s sec second",
    "minute": "min minute",
    "hour": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "cent": "cent penny pennies",
    "dollar": "dollar buck usd",
    "euro": "euro eur",
    "mph": "mph",
    "kmh": "kmh kph",
    "degree": "degree deg °",
    "radian": "radian rad",
}

_OTHER_UNITS = """
acre hectare bushel cup tablespoon teaspoon calorie nickel dime pence shilling rupee yuan yen ruble peso franc krona
won rs inr gbp cny rmb jpy watt kilowatt kw volt ampere ohm joule newton pascal hertz hz khz mhz ghz byte kilobyte
megabyte gigabyte bit decade century centuries fortnight weekday weekend night morning evening semester season knot
block unit point degree celsius fahrenheit °c °f mol mole kelvin bar
"""

_THINGS = """
account acorn action actor adult airplane album alligator amount animal answer ant apartment appetizer apple apricot
arm arrangement arrow article artist athlete attendee avocado award axe baby babies bag bagel bake ball balloon banana
band barrel baseball basket basketball bat batch batches battery batteries bead bean bear bed bedroom bee beetle bell
berry berries bicycle bike bill bird biscuit blanket blouse blueberry blueberries boat bone book bottle bouquet bowl
box boxes boy bracelet branch branches bread breath brick bridge brochure broom brother brownie brush brushes bubble
bucket bug building bulb bun bunch bunches bundle bunny bunnies burger bus buses bush bushes business businesses
butterfly butterflies button buyer cabinet cable cactus cake calf calves camera camper can candle candy candies canoe
cap car card carnation carpet carriage carrot carton case cat caterpillar cell chair channel chapter character cheese
chemist cherry cherries chest chicken chick child children chip chocolate chore church churches circle city cities
class classes classmate classroom client clip cloud clown club coach coaches coat coconut coffee coin color colour
column combination comic commercial computer cone contestant contract cook cookie copy copies corner costume country
countries coupon course cousin cow crab cracker crate crayon cricket crow cupcake curtain customer cut dancer daughter
deer desk dessert device diamond diaper dictionary die dice dinner dinosaur dish dishes distribution doctor dog doll
dolphin donkey donut door doughnut dragon drawer drawing dress dresses drink driver drum duck duckling ear earring
edge egg element elephant email employee engine engineer envelope episode eraser error event exam exercise eye face
factor factory factories family families fan farm farmer father feather fence figure file film finger fire fish fishes
flag flamingo flavor flight floor flower fly flies folder follower fork fox foxes frame friend frog fruit game garden
gem gift giraffe girl glass glasses glove goal goat goldfish goose geese graph grape grasshopper group guest guitar
hamburger hammer hamster hand handshake hat head heart heater hen hive hole home homework hook horse hotdog house
human individual ingredient inhabitant insect instrument integer intersection invitation island item jacket jar jelly
jellybean jerk jersey job journey joke jug juice jump key kid king kite kitten knife knives knight label ladder lady
ladies lake lamb lamp lap laptop lawn lawyer leaf leaves leg lemon lesson letter level light lily lilies line lion
list lizard lobster lock log lollipop loaf loaves lunch lunches machine magazine magnet mail man men mango map marble
marker marshmallow mask mat match matches matchstick meal meatball medal melon member menu message milkshake mirror
missile mistake mitten model monkey monster motorcycle mouse mice mountain movie muffin mug mushroom nail napkin
necklace neighbor neighbour nest net newspaper note notebook novel number nurse nut object onion orange orchid order
outfit outcome oven owl oyster pack package packet page pail paint painting palm pan pancake panda pants paper papaya
parachute paragraph parent park parrot part participant partner party parties passenger pastry pastries patch patches
patient path peach peaches peanut pear pebble peg pen pencil penguin people pepper permutation person pet petal phone
photo photograph picture pie piece pig pigeon piglet pill pillow pin pine pineapple pinecone pirate pizza place plane
planet plank plant plate player plum poem pole pond pony ponies pool popcorn popsicle portion postcard poster pot
potato potatoes pound present president pretzel prime prize problem program project pumpkin pup puppy puppies purse
puzzle queen question quilt quiz quizzes rabbit racer radish radishes raffle rat raisin record rectangle region
repetition reporter request restaurant ribbon ride ring river road robot rock roll room rooster root rope rose round
route row rug ruler run runner sack sailor salad sandwich sandwiches saucer sausage scarf scarves school scientist
scoop seagull seal seashell seat section seed segment selfie sentence serving session shape share shark shed sheep
sheet shelf shelves shell ship shirt shoe shop shot shovel show shrimp sibling side sign singer sister sketch sketches
skirt slice slide snack snail snake snowball snowflake snowman soap soccer sock soda soldier solution son song soup
space spider sponge spoon spot square squirrel stage stair stamp star starfish state station statue steak step stick
sticker stone store story stories strawberry strawberries street string stripe student subject suit suitcase sweater
sweet swimmer switch switches symbol table tadpole target task taxi teacher team teammate teddy tent term test text
textbook theater thing ticket tie tiger tile time tin tire toddler toilet token tomato tomatoes tool tooth teeth
toothbrush toothpick torch torches tourist towel tower town toy tractor train transaction trash tray treat tree trip
trophy trophies truck trumpet tub tube tulip turkey turn turtle tv umbrella uncle van vase vegetable vehicle verse
vertex vertices video videogame village visit visitor volunteer vote voter wagon wall walnut watch watches water
watermelon wave way website whale wheel widget window wing wolf wolves woman women word worker workbook worm yacht
yogurt zebra zombie zoo
"""

_LINKS = "a an of per each every in total altogether left remaining square sq cubic cu"


def _plurals(words: str) -> frozenset[str]:
    return frozenset(word + ending for word in words.split() for ending in ("", "s", "es"))


MEASURES = {word: name for name, words in _MEASURES.items() for word in _plurals(words)}
"""Every spelling of a unit of measurement, and the one name of that unit."""

UNITS = frozenset(MEASURES) | _plurals(_OTHER_UNITS) | _plurals(_THINGS) | frozenset(_LINKS.split())
