"""How stories begin: who the story is about, what they own, where they go one day, and what goes wrong.

The notation is explained in `grammar.py`.
"""

WHO = """
== opening > home
9 Once upon a time, there was {a +trait} {+kind} named {+hero}.
5 Once upon a time, there was a little {+kind} named {+hero}. {He} was {+very} {+trait}.
5 Once upon a time, {a +trait} {+kind} named {+hero} lived in {a +snug} {+home} {+where}. > companion
3 Once there was {a +trait} {+kind} (whose name was|called) {+hero}.
3 There once was a (small|young) {+kind} named {+hero}, who was {+very} {+trait}.
3 Long, long ago, {a +trait} {+kind} named {+hero} lived in {a +snug} {+home} {+where}. > companion
2 Let me tell you about {a +trait} {+kind} named {+hero}.
2 Do you know the (tale|story) of the {+trait} {+kind} named {+hero}? > companion
2 Not so long ago, {a +trait} {+kind} named {+hero} lived in {a +snug} {+home}. > companion

== home > companion
4 {He} lived in {a +snug} {+home} {+where}.
3 {He} lived in {a +snug} {+home} with {his} {+family}.
2 {hero} and {his} {+family} lived {+where}.
2 {He} lived {+where} and dreamed of {a +strange} {+sight}.
5 {He} loved to {+hobby}. [+hobby]
4 More than anything, {hero} (liked|loved|wanted) to {+hobby}. [+hobby]
3 Every (morning|day|week|evening), {he} liked to {+hobby}. [+hobby]
3 {hero} could {+hobby} (all day long|for hours|without stopping). [+hobby]
2 Nobody else liked to {+hobby} as much as {hero} did. [+hobby]
2 When the (stars|clouds|birds) came out, {he} loved to {+hobby}. [+hobby]

== companion > treasure
5 {He} had {a +nature} {+bond} named {+friend}. {friend} could {+skill}.
4 {His} {+bond} {+friend} was {+very} {+nature}. {hero} and {friend} did everything together.
4 if animal: {His} (best|closest) friend was {a +nature} {+pal} named {+friend}.
4 if animal: Next door lived {a +nature} {+pal} named {+friend}. {friend} could {+skill}.
3 {hero} and {his} {+nature} {+bond} {+friend} did everything together.
3 {He} often played {+game} with {his} {+nature} {+bond} {+friend}.
3 {His} {+bond} was named {+friend}. {friend} always (knew|had) a new (game|joke|song|trick|plan).
2 On most days {he} was with {his} {+bond} {+friend}. {friend} was {+very} {+nature}.
"""

OWNED = """
== treasure > day
5 {hero} had {a +look} {+noun} and took it everywhere. [+own, hero gets]
4 {hero}'s favorite thing was {a +look} {+noun}. [+own, hero gets]
3 {hero} owned one (special|great|secret) treasure, {a +look} {+noun}. [+own, hero gets]
3 {hero} never (left home|went out|went anywhere) without {his} {+look} {+noun}. [+own, hero gets]
3 {hero} kept {a +look} {+noun} (beside|under|near) {his} bed. [+own, hero gets]
4 One {+time}, {hero}'s {+elder} gave {him} {a +look} {+noun}. [+own, +elder, hero gets]
4 For {his} birthday, {hero} got {a +look} {+noun} from {his} {+elder}. [+own, +elder, hero gets]
3 {hero}'s {+elder} came to visit and brought {him} {a +look} {+noun}. [+own, +elder, hero gets]
3 In {+season}, {hero} got {a +look} {+noun} from {his} {+elder}. [+own, +elder, hero gets] > thanks
2 One (snowy|rainy|stormy) night, {hero} found {a +look} {+noun} on (the doorstep|the mat|the stairs). [+own, hero gets]
7 ¶ One {+weather} {+time} in {+season}, {hero} and {friend} {+went} to {+place}. [+out, +found] > found
5 ¶ It was a {+weather} {+time}, and {hero} {+went} with {friend} to {+place}. [+out, +baby] > baby
5 ¶ Soon it was {friend}'s birthday, and {hero} wanted to give {friend.him} something special. [+present] > present

== thanks > day
4 "{+Hooray}!" {+cried} {hero}, and {he} {+hugged} {his} {elder}.
3 "Please take good care of it," {his} {elder} said {+softly}.
3 {hero} was so {+glad} that {he} {+jumped} around the (kitchen|table|room).
2 "Is it really mine?" asked {hero}. {His} {elder} {+laughed}.

== day > play ¶ [+out, hero has]
5 One {+weather} {+time}, {hero} and {friend} {+went} to {+place} with the {noun}.
4 One {+weather} {+time} in {+season}, {hero} took the {look} {noun} to {+place}. > trouble
3 "Let us go to {+place}," said {friend} one {+weather} {+time}. "Bring your {noun}!" > trouble
3 On a {+weather} {+time}, {hero} (carried|brought) {his} {noun} to {+place} to meet {friend}.
3 On the first {+time} of {+season}, {hero} and {friend} {+went} to {+place} with the {noun}. > trouble
3 One {+time} in {+season}, {hero}, {friend}, and the {look} {noun} were on the way to {+place}. > trouble

== play > trouble
4 They played {+game} and {+laughed}.
3 They played {+game} until they were (hungry|tired|thirsty|out of breath).
4 On the way they saw {a +strange} {+sight}.
3 {friend} told a story about {a +strange} {+sight}, and {hero} {+laughed}.
2 if woods: They (tasted wild raspberries|followed a deer path|listened to a cuckoo).
2 if field: They (saw shapes in the clouds|blew dandelion seeds|rolled in the grass).
2 if water: They (threw pebbles|dipped their toes|saw minnows) in the water.
2 if shore: They (built a moat|waved at the ships|jumped over the waves).
2 if farm: They (petted the lambs|fed the chickens|climbed on a fence).
2 if garden: They (smelled the lilacs|ran through the sprinkler|fed the goldfish).
2 if town: They (looked in the shop windows|listened to a street band|shared a pretzel).
2 if light: The {noun} (fluttered|danced|trembled) in the breeze.
2 if round: They rolled the {noun} (back and forth|across the ground|down a path).
2 if soft: They had a (picnic|tea party|concert), and the {noun} got a seat.
2 if wheels: {friend} sat on the {noun} like a (race driver|captain|duke).
2 if hard|fragile: {hero} showed {friend} how the {noun} worked.
2 if wear: {friend} tried the {noun} on and {+laughed}.
2 if small|paper: They pretended the {noun} was (magic|from the moon|a secret).

== trouble > lost ¶
5 if soft|wear|paper|small|hard|fragile: {+Number} minutes later, the {look} {noun} was (gone|missing).
  [+lost, hero loses]
4 if soft|wear|paper|small|hard|fragile: Then {hero} looked around. Where was the {noun}? [+lost, hero loses]
4 if small|paper: Later, {hero} (reached|looked) into {his} pocket. It was empty! [+lost, hero loses]
3 if soft|wear|paper|small|hard|fragile: "{+Oh}!" {+cried} {hero}. "Where is my {noun}?" [+lost, hero loses] >
  lost.comfort
8 if light: {+Suddenly} the wind blew the {look} {noun} into a (tall|high|bare) tree. [+stuck, +high, hero loses] >
  stuck
5 if light: (Whoosh|Swish|Puff)! The wind (carried|tossed|threw) the {noun} onto a (roof|ledge|cloud).
  [+stuck, +high, hero loses] > stuck
7 if round: {+Suddenly} the {look} {noun} (rolled|bounced|fell) into a (deep|dark|narrow) hole.
  [+stuck, +deep, hero loses] > stuck
4 if round|small: (Oops|Plop)! The {noun} (slipped|fell) (down a dry well|between two stones|into a ditch).
  [+stuck, +deep, hero loses] > stuck
7 if fragile|hard|wheels: {+Suddenly} {hero} tripped, and the {look} {noun} (broke|cracked|fell apart).
  [+broken, hero has] > broken
4 if hard|wheels: (Bump|Bang)! The {noun} hit a (wall|stump|post), and a piece came off. [+broken, hero has] > broken
5 if soft|wear|paper: {+Suddenly} the {noun} caught on a (nail|thorn|branch|wire) and tore. [+broken, hero has] > broken
6 if small|round|soft|wear|light|paper: {+Suddenly} {a +naughty} {+thief} {+grabbed} the {look} {noun}.
  [+taken, thief takes] > taken
3 if small|round|soft|wear|light|paper: "{+Oh}!" {+cried} {friend}. {A +naughty} {+thief} had {+taken} the {look}
  {noun}.
  [+taken, thief takes] > taken
4 "May I (hold|have|try) the {look} {noun} now?" asked {friend}. "No, it is mine!" {+cried} {hero}.
  [+quarrel, hero has] > quarrel
3 {friend} wanted a turn with the {noun}, but {hero} would not (share|let go|listen). [+quarrel, hero has] > quarrel
"""
