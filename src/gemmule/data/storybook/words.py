"""The words of the storybook: one lexicon for each blank in its sentences.

Each row reads `weight [if needs] [gives tags] [as pronoun]: entry, entry, ...`. Every entry of the row has that
weight, may be chosen only when the story so far has the needed tags, and adds the given tags to the story. No entry
of a lexicon begins another, so the first words of a blank decide what fills it. Heroes, friends and helpers have
separate names: nobody is mistaken for another.
"""

PEOPLE = {
    "trait": """
        5: kind, brave, curious, clever, cheerful, gentle
        4: shy, happy, playful, friendly, quiet, silly
        3: patient, polite, lively, thoughtful, careful, honest, merry, dreamy, helpful, sleepy, bold, jolly,
          generous, lucky
        """,
    "snug": """
        4: small, cozy, big, warm
        3: tall, tidy, quaint, crooked, neat, roomy, quiet, drafty, round
        """,
    "kind": """
        24 gives child girl: girl
        24 gives child boy: boy
        4 gives animal: rabbit, mouse, bear, fox, squirrel
        3 gives animal: hedgehog, duck, frog, otter, badger, beaver, kitten, mole, piglet, penguin
        """,
    "hero": """
        4 if girl|animal as she: Mia, Lily, Anna, Rosie, Ella, Molly
        3 if girl|animal as she: Lucy, Ruby, Clara, Amina, Jasmine, Yuki
        4 if boy|animal as he: Tom, Ben, Max, Leo, Sam, Finn
        3 if boy|animal as he: Oscar, Henry, Noah, Milo, Kofi, Ravi
        """,
    "home": """
        4 if child: house, cottage, cabin
        3 if child: farmhouse, tower, apartment, houseboat, mill, manor, palace
        4 if animal: den, nest, burrow
        3 if animal: hut, cave, hollow tree, tree house, pumpkin, barrel
        """,
    "where": """
        4: by the river, near the woods, on a hill, by the sea
        3: behind the mill, next to a windmill, at the end of a lane, in the mountains, on an island, near an old
          bridge, beside a brook, between two lakes, far away, under the chestnut trees, at the edge of town
        """,
    "family": """
        4: mother and father, grandma and grandpa, big family, parents
        3: three brothers, four sisters, favorite aunt, seven cousins, twin brothers, great-grandmother
        """,
    "elder": """
        5 as she: grandma, mother
        3 as she: aunt
        5 as he: grandpa, father
        3 as he: uncle
        """,
    "hobby": """
        4: sing songs, paint pictures, climb trees, count the stars, jump in puddles, dance in the rain, tell jokes,
          bake bread
        3: build towers, pick berries, chase butterflies, collect shells, watch the clouds, make mud pies, skip
          stones, plant seeds, draw dragons, catch fireflies, play the piano, read about pirates, roll down hills,
          fold paper boats, gather acorns, whistle tunes, wear funny hats, solve riddles, feed the ducks, listen to
          stories, swing very high, look at maps, make wishes, act like a lion, stack blocks, race the wind, write
          letters, invent machines
        """,
    "bond": """
        8 gives anyone: best friend
        4 gives anyone: good friend, cousin, neighbor
        3 if child gives anyone: classmate
        3 if child gives sister: little sister, big sister
        3 if child gives brother: little brother, big brother
        """,
    "pal": """
        4 gives anyone: rabbit, mouse, squirrel, hedgehog
        3 gives anyone: turtle, robin, badger, toad, goose, beaver, lizard, raccoon, chipmunk, sparrow
        """,
    "friend": """
        4 if anyone|sister as she: Zoe, Amy, Hannah, Jane, Kate
        3 if anyone|sister as she: Nina, Poppy, Priya, Mei
        4 if anyone|brother as he: Jim, Dan, Adam, Peter, Charlie
        3 if anyone|brother as he: Billy, George, Omar, Carlos
        """,
    "nature": """
        4: funny, smart, strong, noisy, calm, tall
        3: cheeky, loyal, witty, chatty, daring, messy, graceful, hungry, sensible, freckled, bouncy, stubborn,
          dimpled, serious
        """,
    "skill": """
        4: run very fast, tell funny stories, climb any tree, swim like a fish, whistle like a bird
        3: dance on one leg, juggle three apples, hop like a frog, draw wonderful animals, imitate a trumpet, walk
          on tiptoe, speak to bees, count to one hundred, cook tasty noodles, fix almost anything, yodel, balance a
          spoon, make anyone smile, do magic tricks
        """,
    "helper": """
        3: Willow, Hazel, Clover, Juniper, Pepper, Bluebell, Ginger, Marigold, Barnaby, Bramble, Pickles, Rusty,
          Waddles, Basil
        2: Petunia, Nutmeg, Violet, Dottie, Thistle, Hector, Biscuit, Chester, Gilbert, Sprout
        """,
    "creature": """
        3 if near&woods: owl, deer, woodpecker, chipmunk
        2 if near&woods: moose, lynx, skunk, porcupine
        3 if near&field: hare, lark, pony, cricket
        2 if near&field: ladybug, sheep, partridge, grasshopper
        3 if near&water: heron, swan, turtle, beaver
        2 if near&water: dragonfly, salmon, water rat, newt
        3 if near&shore: crab, seal, pelican, seagull
        2 if near&shore: starfish, lobster, puffin, dolphin
        3 if near&farm: hen, donkey, goose, cow
        2 if near&farm: rooster, turkey, ram, barn cat
        3 if near&garden: robin, snail, toad, bumblebee
        2 if near&garden: butterfly, worm, peacock, spider
        3 if near&town: cat, pigeon, old dog, parrot
        2 if near&town: sparrow, poodle, mouse, hamster
        3 if high: squirrel, crow, monkey, giraffe
        2 if high: blackbird, eagle, marten, raven, lizard, fire fighter, acrobat
        3 if deep: mole, badger, rabbit, fox
        2 if deep: gopher, terrier, armadillo, weasel, ferret, gardener, miner
        """,
    "wise": """
        4: wise, old, young, fat
        3: friendly, chubby, ancient, gentle, cheery, talkative, chirpy, dignified, mighty, hurried, yawning, plump
        """,
    "thief": """
        4 if small|round: magpie, crow, raccoon, squirrel
        3 if small|round: jackdaw, ferret, rat
        4 if soft|wear|light|paper: puppy, goat, kitten, monkey
        3 if soft|wear|light|paper: calf, foal, llama
        """,
    "naughty": """
        4: naughty, sly, wild
        3: greedy, skinny, rude, jumpy, sneaky, scruffy, cheeky
        """,
    "mender": """
        4 if hard|wheels as he: carpenter, toymaker
        3 if hard|wheels as she: tinker, inventor
        4 if fragile as she: potter, glassblower
        3 if fragile as he: clockmaker, jeweler
        4 if soft|wear as she: seamstress, weaver
        3 if soft|wear as he: tailor, cobbler
        4 if paper as she: librarian, teacher
        3 if paper as he: printer, painter
        """,
    "owner": """
        4 as she: little girl, old woman
        3 as she: nurse, dancer, queen, fiddler, student
        4 as he: little boy, old man
        3 as he: sailor, farmer, baker, king, clown, postman, wizard
        """,
    "busy": """
        4: busy, tired, pale, breathless
        3: tall, thin, wealthy, famous, poor, foreign, young, elegant, nearsighted
        """,
    "baby": """
        4: duckling, baby bird, fawn, kitten, puppy
        3: cub, lamb, tadpole, gosling, bunny, baby owl, chick, calf, baby elephant, piglet
        """,
}

THINGS = {
    "look": """
        6 gives plain: red, blue, green, yellow
        5 gives plain: purple, orange, pink, white, speckled
        4 gives plain: golden, silver, brown, lilac, striped, spotted, shiny
        3 gives plain: turquoise, crimson, violet, gray, checkered, flowered, sparkly, dainty
        3 gives cloth: woolly, velvet, knitted, fluffy, patched, silk
        5 gives wood: wooden
        3 gives wood: carved, painted
        3 gives metal: tin, brass, copper
        4 gives glass: glass
        4 gives paperlike: paper, handmade
        """,
    "noun": """
        4 if plain|cloth gives soft: teddy bear, doll, blanket
        3 if plain|cloth gives soft: pillow, puppet, quilt, toy rabbit, toy elephant, cushion
        3 if plain|cloth gives wear: mitten, coat, sweater, cape, slipper, jacket
        2 if plain|cloth gives wear: apron, vest, glove, robe
        4 if plain|cloth gives light: scarf, hat, ribbon
        3 if plain|cloth gives light: flag, bonnet, handkerchief
        5 if plain|paperlike gives light: kite
        3 if plain|paperlike gives light: pinwheel, lantern, fan
        5 if plain gives light: balloon
        3 if plain gives light: feather, umbrella
        5 if plain|wood gives round: ball
        4 if plain|wood gives round: hoop, yo-yo, bead
        4 if plain|glass gives round: marble
        4 if plain|wood gives hard: drum, boat, train
        3 if plain|wood gives hard: flute, truck, toy horse, birdhouse, guitar, whistle, puzzle, airplane, violin,
          castle
        4 if plain|metal gives small: key, bell, coin
        3 if plain|metal gives small: ring, spoon, medal, locket, button, badge, compass, thimble, pocket watch
        4 if plain|glass gives fragile: cup, music box
        3 if plain|glass gives fragile: vase, jar, teapot, bowl, lamp, mirror, plate, snow globe, bottle
        4 if plain gives paper: book
        4 if plain|paperlike gives paper: map
        3 if plain|paperlike gives paper: letter, notebook, crown, postcard, mask, picture
        4 if own&plain|wood gives wheels: wagon, sled
        3 if own&plain|wood|metal gives wheels: scooter, tricycle, cart, wheelbarrow
        """,
    "treat": """
        4: cookies, pie, cake, jam, pancakes, soup
        3: muffins, buns, pudding, tarts, popcorn, nuts, bread, sandwiches, grapes, gingerbread, toast, dumplings,
          waffles, noodles, biscuits, porridge, pizza, yogurt
        """,
    "tasty": """
        4: warm, sweet, fresh, hot
        3: apple, honey, cherry, carrot, tasty, delicious, pumpkin, lemon, crunchy, blueberry, cinnamon, buttery,
          spicy, salty
        """,
    "snack": """
        4: apple, carrot, pear, cracker
        3: walnut, plum, radish, turnip, peach, banana, tomato, strawberry, raisin, cucumber, acorn, potato
        """,
    "ripe": """
        4: juicy, crisp, ripe
        3: sweet, huge, fresh, washed, half, plump, peeled
        """,
    "junk": """
        4: boot, nail, snail, comb, shell, toad
        3: worm, pot, sock, caterpillar, newspaper, fork, beetle, peanut, spider, ant, glove, string, jug, pencil,
          stone, pine cone, broom, mushroom, brick, shoelace, candle, onion, stocking, paintbrush, can
        """,
    "shabby": """
        4: old, sleepy, rusty, dusty
        3: broken, wet, muddy, grumpy, torn, cracked, smelly, ugly, plain, bent, crusty, lazy, moldy, lonesome,
          dirty
        """,
    "sight": """
        4: rainbow, swan, parade, ship, pyramid, tram
        3: horse, cloud, dragon, bear, carpet, giant, bird, mermaid, ghost, elephant, garden, sailboat, camel,
          whale, juggler, wolf, fish, snake, snowman, unicorn, lion, rocket, waterfall, tiger, ladder, zebra, robot
        """,
    "strange": """
        4: starry, moonlit, black, gigantic
        3: strange, flying, dancing, singing, magic, friendly, glowing, lovely, tame, blue-eyed, upside-down,
          invisible, sparkling, floating, marching, dotted, royal
        """,
}

PLACES = {
    "place": """
        4 gives woods: the forest, the pine woods
        3 gives woods: the oak grove, the fern glade, the maple wood, the hidden clearing, the misty hollow
        4 gives field: the meadow, the hill
        3 gives field: the clover field, the green valley, the sunflower field, the high cliff, the sheep path
        4 gives water: the pond, the river
        3 gives water: the lake, the stream, the waterfall, the marsh, the old canal
        4 gives shore: the beach, the harbor
        3 gives shore: the bay, the lighthouse, the pier, the rocky cove, the ferry dock
        4 gives farm: the farm, the barn
        3 gives farm: the orchard, the pumpkin patch, the stable, the cornfield, the vineyard
        4 gives garden: the park, the garden
        3 gives garden: the playground, the rose garden, the greenhouse, the zoo, the maze
        4 gives town: the market, the village square
        3 gives town: the fair, the train station, the museum, the toy shop, the library
        """,
    "spot": """
        3 if woods: under the ferns, behind a hollow log, among the mushrooms, between the roots, under a pile of
          leaves, around the tallest pine
        3 if field: in the tall grass, among the daisies, behind a hay bale, under a thorn bush, along the fence, in
          a rabbit hole
        3 if water: among the reeds, under the little bridge, behind the willow, between the lily pads, along the
          muddy bank, in the rowboat
        3 if shore: behind the dunes, under a fishing net, among the seaweed, between the rocks, in the sand castle,
          around the old anchor
        3 if farm: in the hay, behind the tractor, under the milk buckets, among the cabbages, in the chicken coop,
          around the scarecrow
        3 if garden: under the slide, behind the fountain, among the tulips, under every bench, around the sandbox,
          in the flower beds
        3 if town: under the fruit stall, behind a barrel, in the phone booth, along the pavement, around the
          statue, under a parked car
        """,
    "nook": """
        3 if woods: beside a mossy stump, under a huge toadstool, in a patch of ivy, behind a bramble, at the foot
          of a birch
        3 if field: beside a molehill, in a ring of clover, under a poppy, on a flat boulder, behind the wooden gate
        3 if water: on a floating leaf, beside a frog, under the jetty, in a shallow puddle, on top of a beaver dam
        3 if shore: inside a bucket, beside a tide pool, under a beach towel, on a piece of driftwood, in a coil of
          rope
        3 if farm: beside the water trough, in the wheat, on top of a sack of potatoes, under a horse blanket,
          behind the plow
        3 if garden: beside the watering can, under a rose bush, in the bird bath, on the seesaw, behind the garden
          shed
        3 if town: beside the bakery door, on the church steps, under a lamppost, in a basket of lemons, behind the
          ticket booth
        """,
    "weather": """
        5: sunny, warm, bright
        4: windy, cool, cloudy, fine
        3: chilly, misty, breezy, dewy, frosty, lovely, hazy, mild
        """,
    "time": """
        5: day, morning, afternoon
        3: evening, Saturday, Sunday
        2: Monday, Tuesday, Wednesday, Thursday, Friday
        """,
    "season": """
        3: spring, summer, autumn, winter
        2: March, April, May, June, July, August, September, October
        """,
    "game": """
        4: hide and seek, tag, pirates, hopscotch
        3: leapfrog, knights and dragons, explorers, follow the leader, catch, circus, astronauts, detectives, shop,
          school, mountain goats, statues
        """,
    "number": """
        2: two, three, four, five
        1: six, seven, eight, nine, ten, eleven, twelve, twenty
        """,
    "then": """
        5: then, soon, at last
        4: just then, after a while, finally
        3: at that moment, later, a minute later, a little later, in the end
        """,
    "suddenly": """
        5: suddenly, then
        3: all at once, just then, a moment later, before long, soon, but then, out of nowhere
        """,
}

FEELINGS = {
    "sad": """
        5: sad, upset, worried, unhappy
        4: scared, sorry, gloomy, miserable
        3: heartbroken, lonely, nervous, confused, shocked, helpless, puzzled, grumpy, hurt, afraid, disappointed
        """,
    "glad": """
        5: happy, glad, proud, excited
        4: delighted, thankful, joyful, cheered
        3: relieved, amazed, overjoyed, content, thrilled, grateful, surprised, calm, hopeful, satisfied,
          lighthearted
        """,
    "oh": """
        4: Oh no, Oh dear, Help, Goodness
        3: Oh my, Dear me, Good grief, Alas, Wait, Bother
        """,
    "hooray": """
        4: Hooray, Thank you, Wonderful, Yippee
        3: Hurray, Fantastic, Marvelous, Wow, Bravo, Splendid
        """,
}

DEEDS = {
    "said": """
        8: said
        3: whispered, called, murmured, answered
        2: declared, explained, announced, added
        """,
    "cried": """
        4: cried, shouted, called
        3: yelled, exclaimed, gasped, squealed
        2: wailed, screamed, bellowed
        """,
    "sobbed": """
        4: sobbed, whispered, sighed
        3: sniffed, mumbled, groaned, whimpered, moaned
        2: stammered, wept
        """,
    "laughed": """
        4: laughed, giggled, smiled, cheered
        3: chuckled, grinned, beamed, clapped, danced
        2: hummed, whistled, twirled, bowed
        """,
    "went": """
        5: went, walked, ran
        3: hurried, raced, skipped, wandered, marched, strolled
        2: hopped, rushed, tiptoed, trotted, cycled
        """,
    "jumped": """
        4: jumped, danced, hopped
        3: twirled, spun, skipped, bounced, swayed
        """,
    "looked": """
        5: looked, searched
        3: hunted, peeked, poked, checked, crawled
        """,
    "grabbed": """
        4: grabbed, snatched, stole
        3: took, seized, swiped
        """,
    "taken": """
        4: grabbed, stolen
        3: taken, seized, swiped, hidden
        """,
    "hugged": """
        4: hugged, kissed, held
        3: squeezed, stroked, patted
        """,
    "softly": """
        4: softly, kindly, gently, quietly
        3: quickly, bravely, cheerfully, politely, warmly, calmly, firmly, eagerly, shyly
        2: wisely, brightly, seriously, patiently, slowly, proudly, loudly
        """,
    "very": """
        5: very, so, really
        3: truly, quite, ever so
        """,
}

LEXICONS = PEOPLE | THINGS | PLACES | FEELINGS | DEEDS
