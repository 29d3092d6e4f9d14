"""The words of the storybook: one lexicon for each blank in its sentences.

Each row reads `weight [if needs] [gives tags] [as pronoun]: entry, entry, ...`. Every entry of the row has that weight, may be
chosen only when the story so far has the needed tags (`a|b` either, `a&b` both), and adds the given tags to the story. No
entry of a lexicon begins another, so the first words of a blank decide what fills it. Heroes, friends and helpers have
separate names: nobody is mistaken for another.
"""

PEOPLE = {
    "trait": """
        6: kind, brave, curious, clever, cheerful
        4: gentle, shy, happy, playful, friendly, quiet, silly
        2: patient, polite, lively, thoughtful, careful, honest, merry, dreamy, helpful, sleepy, bold, jolly,
          generous, lucky
        """,
    "kind": """
        30 gives child girl: girl
        30 gives child boy: boy
        4 gives animal: rabbit, mouse, bear, fox, squirrel
        2 gives animal: hedgehog, duck, frog, otter, badger, beaver, kitten, mole, piglet, penguin
        """,
    "hero": """
        6 if girl|animal as she: Mia, Lily, Anna, Rosie, Ella, Molly, Emma
        3 if girl|animal as she: Sophie, Lucy, Nora, Ruby, Grace, Ivy, Clara, Maya, Alice, Stella, Penny
        1 if girl|animal as she: Amina, Bella, Cora, Dora, Freya, Greta, Heidi, Ines, Jasmine, Kira, Leila, Matilda,
          Yuki
        6 if boy|animal as he: Tom, Ben, Max, Leo, Sam, Finn, Jack
        3 if boy|animal as he: Oscar, Henry, Theo, Noah, Eli, Toby, Hugo, Milo, Felix, Jamie, Oliver
        1 if boy|animal as he: Ali, Bruno, Caspar, David, Emil, Franz, Gus, Ivan, Jonas, Kofi, Luis, Mateo, Ravi
        """,
    "home": """
        4 if child: in a small house by the river, in a cozy cottage, on a quiet street, in a tall brick house, on a
          busy farm
        2 if child: above a bakery, next to a windmill, at the end of a long lane, in a village by the sea, in a
          cabin in the mountains, in a big noisy city, on a houseboat, in a white house with a red door, near an old
          stone bridge
        5 if animal: in a cozy den, under a big oak tree, in a tiny house made of twigs, at the edge of the woods
        3 if animal: in a warm burrow, behind a waterfall, beneath the roots of a willow, inside a hollow tree,
          beside a sunny brook
        """,
    "family": """
        4: mother and father, grandma and grandpa, big family, parents
        2: three brothers, four sisters, favorite aunt, seven cousins, twin brothers, uncle and aunt
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
          stones, plant seeds, draw dragons, catch fireflies, play the piano, read about pirates
        2: roll down hills, fold paper boats, gather acorns, whistle tunes, wear funny hats, solve riddles, feed the
          ducks, listen to stories, swing very high, look at maps, make wishes, act like a lion, stack blocks, race
          the wind, write letters, invent machines
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
        2 gives anyone: turtle, robin, badger, toad, goose, beaver, lizard, raccoon, chipmunk, sparrow
        """,
    "friend": """
        5 if anyone|sister as she: Zoe, Amy, Hannah, Jane, Kate
        3 if anyone|sister as she: Lola, Nina, Poppy, Sara, Tess, Wendy, Daisy, Emily, Holly
        1 if anyone|sister as she: Maria, Olga, Priya, Rita, Tara, Una, Vera, Elsa, Flora, Mei
        5 if anyone|brother as he: Jim, Dan, Adam, Peter, Charlie
        3 if anyone|brother as he: Alex, Billy, George, Luke, Nick, Otto, Paul, Simon, Will
        1 if anyone|brother as he: Andy, Carlos, Erik, Frank, Hans, Juan, Karim, Omar, Pablo, Victor
        """,
    "skill": """
        4: run very fast, tell funny stories, climb any tree, swim like a fish, whistle like a bird
        2: dance on one leg, juggle three apples, hop like a frog, draw wonderful animals, imitate a trumpet, walk
          on tiptoe, speak to bees, count to one hundred, bake tasty muffins, fix almost anything, yodel, balance a
          plate on one finger, make anyone smile
        """,
    "helper": """
        3 as she: Willow, Hazel, Clover, Juniper, Pepper, Bluebell, Ginger, Marigold
        1 as she: Petunia, Rosemary, Nutmeg, Winnie, Violet, Dottie, Henrietta, Fern
        3 as he: Barnaby, Bramble, Pickles, Rusty, Waddles, Basil, Thistle, Hector
        1 as he: Biscuit, Chester, Dexter, Gilbert, Mortimer, Pip, Sprout, Truffle
        """,
    "creature": """
        3 if woods: owl, deer, woodpecker
        2 if woods: chipmunk, moose, weasel
        3 if field: hare, lark, pony
        2 if field: cricket, ladybug, sheep
        3 if water: heron, swan, turtle
        2 if water: dragonfly, salmon, water rat
        3 if shore: crab, seal, pelican
        2 if shore: seagull, starfish, lobster
        3 if farm: hen, donkey, goose
        2 if farm: cow, rooster, turkey
        3 if garden: robin, snail, toad
        2 if garden: bumblebee, butterfly, worm
        3 if town: cat, pigeon, old dog
        2 if town: parrot, sparrow, poodle
        """,
    "climber": """
        3: squirrel, crow, monkey, tall giraffe
        2: woodpecker, eagle, marten, raven, lizard
        """,
    "digger": """
        3: mole, badger, rabbit, fox
        2: gopher, terrier, armadillo, weasel, ferret
        """,
    "thief": """
        4 if small|round: magpie, crow, raccoon, squirrel
        2 if small|round: jackdaw, ferret
        4 if soft|wear|light|paper: puppy, goat, kitten, monkey
        2 if soft|wear|light|paper: calf, foal, llama
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
        2 as she: nurse, dancer, queen, fiddler
        4 as he: little boy, old man
        2 as he: sailor, farmer, baker, king, clown, postman
        """,
    "baby": """
        4: duckling, baby bird, fawn, kitten, puppy
        2: cub, lamb, tadpole, gosling, bunny, baby owl, chick, calf, baby elephant, piglet
        """,
}

THINGS = {
    "look": """
        8 gives plain: red, blue, green, yellow
        5 gives plain: purple, orange, pink, white, little
        3 gives plain: golden, silver, brown, tiny, striped, spotted, shiny
        2 gives plain: turquoise, crimson, violet, gray, checkered, rainbow, pretty, funny
        3 gives cloth: woolly, velvet, knitted
        2 gives cloth: fluffy, patched, silk
        5 gives wood: wooden
        2 gives wood: carved, painted
        3 gives metal: tin, brass
        2 gives metal: copper
        4 gives glass: glass
        3 gives paperlike: paper, handmade
        """,
    "noun": """
        6 if plain|cloth gives soft: teddy bear, doll, blanket
        3 if plain|cloth gives soft: pillow, puppet, quilt, toy rabbit, toy elephant, cushion
        3 if plain|cloth gives wear: mitten, coat, sweater, cape, slipper, jacket
        1 if plain|cloth gives wear: apron, vest, glove, robe
        4 if plain|cloth gives light: scarf, hat, ribbon
        2 if plain|cloth gives light: flag, bonnet, handkerchief
        5 if plain|paperlike gives light: kite
        2 if plain|paperlike gives light: pinwheel, lantern, fan
        5 if plain gives light: balloon
        2 if plain gives light: feather, umbrella
        6 if plain|wood gives round: ball
        3 if plain|wood gives round: hoop, yo-yo, bead
        3 if plain|glass gives round: marble
        4 if plain|wood gives hard: drum, boat, train
        2 if plain|wood gives hard: flute, truck, toy horse, birdhouse, guitar, whistle, puzzle, airplane, violin,
          castle
        4 if plain|metal gives small: key, bell, coin
        2 if plain|metal gives small: ring, spoon, medal, locket, button, badge, compass, thimble, pocket watch
        4 if plain|glass gives fragile: cup, music box
        2 if plain|glass gives fragile: vase, jar, teapot, bowl, lamp, mirror, plate, snow globe, bottle
        4 if plain gives paper: book
        4 if plain|paperlike gives paper: map
        2 if plain|paperlike gives paper: letter, notebook, crown, postcard, mask, picture
        4 if own&plain|wood gives wheels: wagon, sled
        2 if own&plain|wood|metal gives wheels: scooter, tricycle, cart, wheelbarrow
        """,
    "treat": """
        4: warm cookies, apple pie, honey cake, strawberry jam, hot chocolate, pancakes
        2: blueberry muffins, lemonade, cinnamon buns, vanilla pudding, cherry tarts, carrot soup, popcorn, roasted
          nuts, banana bread, peach ice cream, cheese sandwiches, sweet grapes, pumpkin pie, gingerbread, buttered
          toast, plum dumplings, melon slices, waffles
        """,
    "snack": """
        3: a red apple, a carrot, a bit of cheese, some bread crumbs, a ripe pear
        2: some sunflower seeds, a cracker, a walnut, half a sandwich, a spoonful of oatmeal, some corn, a handful
          of cherries, a juicy plum, a radish, some lettuce
        """,
    "junk": """
        3: an old boot, a sleepy snail, a rusty nail, two fat worms, an empty shell, a broken comb, a pine cone, a
          grumpy toad
        2: three beetles, a cracked pot, a lost sock, a hairy caterpillar, a wet newspaper, a bent fork, some
          feathers, a spider web, half a peanut, a busy ant, a torn glove, an acorn cap, a piece of string, a dusty
          bottle, a smelly cheese, a chewed pencil, a mossy stone
        """,
}

PLACES = {
    "place": """
        5 gives woods: the forest, the pine woods
        2 gives woods: the oak grove, the fern glade, the maple wood, the hidden clearing
        5 gives field: the meadow, the hill
        2 gives field: the clover field, the green valley, the sunflower field, the windy cliff
        5 gives water: the pond, the river
        2 gives water: the lake, the stream, the waterfall, the marsh
        5 gives shore: the beach, the harbor
        2 gives shore: the bay, the lighthouse, the pier, the rocky cove
        5 gives farm: the farm, the barn
        2 gives farm: the orchard, the pumpkin patch, the stable, the cornfield
        5 gives garden: the park, the garden
        2 gives garden: the playground, the rose garden, the greenhouse, the zoo
        5 gives town: the market, the village square
        2 gives town: the fair, the train station, the museum, the toy shop
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
          statue, under a parked cart
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
        6: sunny, warm, bright
        4: windy, cool, cloudy, fine
        2: chilly, misty, breezy, golden, frosty, lovely, hazy, mild
        """,
    "time": """
        6: day, morning
        4: afternoon
        2: evening, Saturday, Sunday
        1: Monday, Tuesday, Wednesday, Thursday, Friday
        """,
    "season": """
        3: spring, summer, autumn, winter
        1: April, May, June, July, August, September, October
        """,
    "game": """
        4: hide and seek, tag, pirates, hopscotch
        2: leapfrog, knights and dragons, explorers, follow the leader, catch, circus, astronauts, detectives, shop,
          school, mountain goats, statues
        """,
}

FEELINGS = {
    "sad": """
        6: sad, upset, worried
        4: unhappy, scared, sorry
        2: gloomy, miserable, heartbroken, lonely, nervous, confused, shocked
        """,
    "glad": """
        6: happy, glad, proud
        4: excited, delighted, thankful
        2: joyful, cheered, relieved, amazed, overjoyed, content, thrilled
        """,
}

LEXICONS = PEOPLE | THINGS | PLACES | FEELINGS
