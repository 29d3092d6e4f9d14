"""How stories begin: who the story is about, what they own, where they go one day, and what goes wrong.

The notation is explained in `grammar.py`.
"""

WHO = """
== opening > home
8 Once upon a time, there was {a +trait} {+kind} named {+hero}.
5 Once upon a time, there was a little {+kind} named {+hero}. {He} was (very|always|so) {+trait}. > hobby
4 Once upon a time, {a +trait} {+kind} named {+hero} lived {+home}. > hobby
3 Once there was {a +trait} {+kind} whose name was {+hero}.
2 There once was a (small|young) {+kind} named {+hero}, who was (quite|rather|truly) {+trait}. > hobby
2 Long, long ago, {a +trait} {+kind} named {+hero} lived {+home}. > hobby
2 Let me tell you about {a +trait} {+kind} named {+hero}.
2 Do you know the (tale|story) of the {+trait} {+kind} named {+hero}? It (begins|starts) {+home}. > companion
2 Not so long ago, a {+kind} named {+hero} lived {+home}. Everybody said {he} was {+trait}. > companion

== home > companion
5 {He} lived {+home}.
4 {He} lived {+home} with {his} {+family}.
3 {hero} and {his} {+family} lived {+home}.
2 {His} home was {+home}, and it was (never|seldom) (boring|dull) there.
2 {He} slept {+home}, but {he} (dreamed|thought) of (great adventures|faraway lands).
6 {He} loved to {+hobby}. [+hobby]
2 {His} (head|mind) was full of ideas, and {he} loved to {+hobby}. [+hobby]

== hobby > companion [+hobby]
6 {He} loved to {+hobby}.
4 More than anything, {hero} (liked|loved) to {+hobby}.
3 Every (morning|day|week), {he} liked to {+hobby}.
3 {hero} could {+hobby} (all day long|for hours).
2 Nobody else liked to {+hobby} as much as {hero} did.
2 When the (stars|clouds|birds) came out, {he} loved to {+hobby}.
2 If you (asked|let) {him}, {he} would {+hobby} from breakfast until (supper|bedtime).

== companion > treasure
6 {He} had a {+bond} named {+friend}, who could {+skill}.
4 {His} {+bond} was named {+friend}.
5 if animal: {His} (best|closest) friend was {a +pal} named {+friend}.
3 if animal: Next door lived {a +pal} named {+friend}, who could {+skill}.
4 {hero} and {his} {+bond}, {+friend}, did everything together.
3 {He} often (played|laughed|sang) with {his} {+bond}, {+friend}.
2 {His} {+bond} {+friend} always (knew|had) a new (game|joke|song).
2 On most days {he} played with {his} {+bond} {+friend}, who (never stopped talking|had freckles|was full of ideas).
"""

OWNED = """
== treasure > day
6 {hero} had {a +look} {+noun} and took it everywhere. [+own, hero gets]
4 {His} favorite thing was {a +look} {+noun}. [+own, hero gets]
4 {He} owned one (special|great) treasure, {a +look} {+noun}. [+own, hero gets]
3 {hero} never (left home|went out) without {his} {+look} {+noun}. [+own, hero gets]
3 {He} kept {a +look} {+noun} (beside|under) {his} bed and loved it (dearly|very much). [+own, hero gets]
5 One day, {his} {+elder} gave {him} {a +look} {+noun}. [+own, +elder, hero gets] > thanks
4 For {his} birthday, {hero} got {a +look} {+noun} from {his} {+elder}. [+own, +elder, hero gets] > thanks
3 {His} {+elder} came (home|to visit) and brought {him} {a +look} {+noun}. [+own, +elder, hero gets] > thanks
2 One (snowy|rainy) night, {hero} found a box on (the doorstep|the mat). In it was {a +look} {+noun}! [+own, hero
  gets]
7 ¶ One {+weather} {+time}, {hero} and {friend} were on the way to {+place}. [+out, +found] > found
5 ¶ It was a {+weather} {+time}, and {hero} walked with {friend} to {+place}. [+out, +baby] > baby
4 ¶ Soon it was {friend}'s birthday. {hero} wanted to give {friend.him} something special. > present

== thanks > day
4 "Thank you, {elder}!" (said|cried|shouted) {hero}. "I will take good care of it."
3 "It is (beautiful|lovely|perfect|wonderful)!" said {hero}, and {he} hugged {his} {elder}.
3 "Please take good care of it," said {his} {elder}, and {hero} (promised|agreed).
3 {hero} was so (pleased|excited) that {he} danced around the (kitchen|table|room).
2 {He} said it was the best (gift|present|surprise) in the whole world.
2 "Is it really mine?" asked {hero}. {His} {elder} (nodded|winked|laughed).

== day > play ¶ [+out, hero has]
6 One {+weather} {+time}, {hero} and {friend} went to {+place} with the {look} {noun}.
4 One {+weather} {+time}, {hero} took the {look} {noun} to {+place}. {friend} came too.
3 "Let us go to {+place}," said {friend} one {+weather} {+time}. "Bring your {noun}!"
3 On a {+weather} {+time}, {hero} (carried|brought) {his} {noun} to {+place} to meet {friend}.
3 On the first day of {+season}, {hero} and {friend} (hurried|walked|raced) to {+place}. {hero} had {his} {noun}.
2 One {+time} in {+season}, {friend} (knocked|called). "Come to {+place}, {hero}, and bring your {look} {noun}!"

== play > trouble
4 They played {+game} and laughed.
3 They played {+game} until they were (hungry|tired|out of breath).
3 First they played {+game}. Then they (rested|sat) in the (shade|sun).
2 {friend} told a (riddle|silly story), and {hero} (laughed|giggled) out loud.
2 if woods: They listened to a cuckoo and (tasted wild raspberries|followed a deer path).
2 if field: They lay on their backs and (saw shapes in the clouds|blew dandelion seeds).
2 if water: They (threw pebbles|dipped their toes) in the water and watched the (ripples|minnows).
2 if shore: They built a sand castle with (a moat|three towers) and (waved at the ships|listened to the waves).
2 if farm: They (petted the lambs|fed the chickens) and (rode|climbed) on the old tractor.
2 if garden: They smelled the (lilacs|roses) and (ran through the sprinkler|counted the bees).
2 if town: They looked in the shop windows and (listened to a street band|shared a pretzel).
2 if light: The {noun} (fluttered|danced) in the breeze, and {friend} clapped {friend.his} hands.
2 if round: They rolled the {noun} back and forth (between them|across the ground).
2 if soft: They had a (picnic|tea party), and the {noun} got a seat of its own.
2 if wheels: {friend} (pushed|pulled) the {noun}, and {hero} (steered|rode) like a (race driver|captain).
2 if hard|fragile: {hero} showed {friend} how the {noun} worked.
2 if wear: {friend} tried the {noun} on and (bowed|strutted) like a (prince|peacock).
2 if small|paper: {hero} and {friend} (pretended|imagined) the {noun} was (magic|from the moon).

== trouble > lost ¶
6 if soft|wear|paper|small|hard|fragile: But soon the {look} {noun} was (gone|missing). [+lost, hero loses]
4 if soft|wear|paper|small|hard|fragile: Then {hero} looked around. Where was the {noun}? [+lost, hero loses]
4 if small|paper: Later, {hero} (reached|looked) into {his} pocket. It was empty! [+lost, hero loses]
3 if small|wear|soft: On the way home, {hero} (stopped|stood still). The {look} {noun} was not there! [+lost, hero
  loses]
8 if light: Suddenly the wind blew the {look} {noun} into a (tall|high) tree. [+stuck, +high, hero loses] > stuck
5 if light: Whoosh! A gust of wind (carried|tossed) the {look} {noun} onto a (roof|ledge). [+stuck, +high, hero loses]
  > stuck
7 if round: Suddenly the {look} {noun} (rolled|bounced) into a (deep|dark) hole. [+stuck, +deep, hero loses] > stuck
4 if round|small: Oops! The {noun} (slipped|fell) (down a dry well|between two stones). [+stuck, +deep, hero loses] >
  stuck
7 if fragile|hard|wheels: {hero} tripped over a (root|rope). Crack! The {look} {noun} was broken. [+broken, hero has]
  > broken
4 if hard|wheels: Bump! The {noun} hit a (rock|stump), and a piece came off. [+broken, hero has] > broken
5 if soft|wear|paper: The {noun} caught on a (nail|thorn|branch). Rip! It was torn. [+broken, hero has] > broken
6 if small|round|soft|wear|light|paper: Just then {a +thief} came up and (grabbed|snatched) the {look} {noun}.
  [+taken, thief takes] > taken
3 if small|round|soft|wear|light|paper: "Look out!" (cried|shouted) {friend}. But {a +thief} had already stolen the
  {look}
  {noun}. [+taken, thief takes] > taken
4 "May I (hold|have) the {look} {noun} now?" asked {friend}. "No, it is mine!" said {hero}. [+quarrel, hero has] >
  quarrel
3 {friend} wanted a turn with the {look} {noun}, but {hero} would not (share|let go). [+quarrel, hero has] > quarrel
"""
