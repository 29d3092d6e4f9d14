"""What happens in the middle: things are lost and found, stuck and freed, broken and mended, taken and given back,
quarrelled over and shared; somebody else's thing is returned, a baby animal is brought home, a present is made.

The notation is explained in `grammar.py`.
"""

LOST = """
== lost > lost.comfort
5 {hero} was very {+sad}.
3 {hero} (began|started) to cry. {He} felt {+sad}.
3 "Oh no!" cried {hero}. "I have lost my {noun}!"
2 A (big|fat) tear rolled down {hero}'s (cheek|nose).
2 "My {look} {noun} is gone," (whispered|sobbed) {hero}, and {he} felt {+sad}.
2 {His} heart (sank|beat fast), and {he} felt {+sad}.

== lost.comfort > lost.search
4 "Do not (worry|cry)," said {friend}. "We will find it."
3 "I will help you," said {friend}. "Where did you (see|have) it last?"
3 {friend} (took|held) {his} hand. "Let us look (everywhere|together)," {friend.he} said.
2 {friend} (hugged|comforted) {him} and said they would search until (sunset|dark).
2 "Think (hard|carefully)," said {friend}. "When did you last (hold|see) the {noun}?"
2 "Four eyes see more than two," said {friend}.

== lost.search > lost.turn
6 They looked {+spot}, but they found only {+junk}.
4 First they (searched|looked) {+spot}. There was nothing but {+junk}.
3 {hero} (crawled|looked) {+spot} and found {+junk}, but no {noun}.
3 {friend} searched {+spot}. "I see only {+junk}," {friend.he} (said|sighed).
2 They looked {+spot}. They asked everyone. Nobody had seen the {look} {noun}.
2 They searched high and low. They even looked {+spot}.

== lost.turn > joy ¶
5 Then {friend} looked {+nook}. There was the {look} {noun}! [friend finds] > friend.gives
3 "Over here!" (shouted|called) {friend}. {friend.He} had found the {look} {noun} {+nook}. [friend finds] >
  friend.gives
4 At last {hero} saw something {+nook}. It was the {look} {noun}! [hero finds]
3 {hero} closed {his} eyes and (thought|remembered). Then {he} found the {look} {noun} {+nook}. [hero finds]
5 Just then, {a +creature} named {+helper} came (by|along) with the {look} {noun}. [helper finds] > helper.gives
4 They met {a +creature} named {+helper}, who had found the {look} {noun} {+nook}. [helper finds] > helper.gives
2 "Are you looking for this?" asked {a +creature} named {+helper}. It was the {look} {noun}! [helper finds] >
  helper.gives

== friend.gives > joy [friend gives hero]
5 {friend} gave the {noun} (back|at once) to {hero}.
3 "Here is your {noun}," said {friend}, and {hero} (took|grabbed) it with both hands.
2 {friend} (wiped|brushed) off the dust and handed the {noun} to {hero}.
2 {friend} (ran|skipped) over and put the {noun} in {hero}'s arms.

== helper.gives > joy [helper gives hero]
5 {helper} gave the {noun} back to {hero}.
3 "That is my {noun}!" said {hero}, and {helper} gave it to {him}.
3 "Here you are," said {helper}, and {helper.he} handed {hero} the {noun}.
2 if lost: "I kept it (safe|dry) for you," said {helper}, and {helper.he} gave {hero} the {noun}.
2 if stuck: "That was easy," (laughed|panted) {helper}, and {helper.he} gave {hero} the {noun}.

== joy > finish [hero has]
4 {hero} hugged the {noun} (tightly|hard). {He} was so {+glad}.
4 {hero} was so {+glad} that {he} (jumped|danced|spun) around.
3 "Thank you!" said {hero}, and {he} felt very {+glad}.
3 "Thank you for your help, {friend}," said {hero}. {friend} was {+glad} too.
2 {hero} (held|pressed) the {noun} close and felt {+glad} again.
2 "Hooray!" they (cried|shouted) together.
"""

STUCK = """
== stuck > stuck.try
4 "Oh no, my {noun}!" cried {hero}.
4 {hero} felt {+sad}. How could {he} ever get the {noun} back?
3 if high: They (stared|looked) up. The {noun} was (much|far) too high.
3 if deep: They (peered|looked) down. It was (much|far) too deep.
2 {hero} was so {+sad} that {he} (could not speak|sat down and cried).

== stuck.try > stuck.help
3 if high: {friend} (jumped|hopped) as high as {friend.he} could, but it was no use.
3 if high: {hero} stood on {friend}'s shoulders, but {he} could not reach it.
2 if high: They threw (pebbles|sticks|balls of mud) at it, but the {noun} (did not move|only wobbled).
2 if high: {friend} tried to climb up and slid right down again.
3 if deep: {hero} (stretched|reached) down, but {his} arm was too short.
3 if deep: {friend} tried with a long (stick|ladle|rake), but {friend.he} only pushed it deeper.
2 if deep: They lowered a hook on a (rope|shoelace), but it came up (empty|bent).
2 "We should ask someone for help," said {friend}. {hero} (nodded|agreed).

== stuck.help > helper.gives ¶
4 if high: Then {a +climber} named {+helper} came by. {helper.He} went up and (fetched|freed) the {look} {noun}.
  [helper finds]
3 if high: "I can help," said {a +climber} named {+helper}. Soon {helper.he} had the {look} {noun}. [helper finds]
2 if high: They called {a +climber} named {+helper}, who liked high places and got the {look} {noun}. [helper finds]
4 if deep: Then {a +digger} named {+helper} came by. {helper.He} dug and dug and (fetched|freed) the {look} {noun}.
  [helper finds]
3 if deep: "I can help," said {a +digger} named {+helper}. Soon {helper.he} had the {look} {noun}. [helper finds]
2 if deep: They called {a +digger} named {+helper}, who liked dark tunnels and got the {look} {noun}. [helper finds]
4 {friend} made a (ladder|long hook) out of (branches|old boards) and got the {look} {noun}. [friend finds] >
  friend.gives
2 if high: They waited. At last the {look} {noun} (fell|dropped) right into {hero}'s arms. [hero finds] > joy
2 if deep: {hero} dug with a (shovel|clam shell) until {he} could grab the {look} {noun}. [hero finds] > joy
"""

BROKEN = """
== broken > broken.comfort
4 {hero} was very {+sad}. "My (poor|dear) {noun}!" {he} (cried|sobbed).
3 {hero} (picked up|looked at) the {look} {noun} and felt {+sad}.
3 "It is (ruined|spoiled)!" cried {hero}.
2 For a moment, nobody said a word. {hero} was {+sad}.

== broken.comfort > broken.help
4 "(Perhaps|Maybe) someone can (fix|mend) it," said {friend}.
3 "I am so sorry," said {friend}, and {friend.he} put an arm around {hero}.
2 "Do not (throw it away|give up)," said {friend}. "I have an idea."
2 {friend} gave {hero} a (handkerchief|hug) and thought (hard|quickly).

== broken.help > broken.work ¶ [hero gives mender]
5 They took the {look} {noun} to {a +mender}.
3 {friend} knew {a +mender} who lived (nearby|around the corner). {hero} gave {mender.him} the {noun}.
2 Down the road, {a +mender} had a (tiny|messy|famous) workshop. {hero} gave {mender.him} the {noun}.

== broken.work > broken.back
4 if hard|wheels: The {mender} used (glue|a hammer|a screwdriver) and (a drop of paint|lots of patience).
4 if fragile: The {mender} glued the pieces together, (one by one|slowly and neatly).
4 if soft|wear: The {mender} took a needle and (thread|yarn) and made (tiny|neat) stitches.
4 if paper: The {mender} (took|used) (tape|paste) and smoothed every (corner|wrinkle).
2 The {mender} put on (thick glasses|a big apron) and (hummed|worked|whistled) for an hour.
2 "This needs (a steady hand|time)," said the {mender}, and {mender.he} worked until (noon|sunset).

== broken.back > broken.end [mender gives hero]
4 Then {mender.he} gave the {noun} back to {hero}. It (looked|was) as good as new.
3 "Here you are," said the {mender}, and {mender.he} gave {hero} the {noun}. You could hardly see the (damage|spot).
2 When {hero} got the {noun} back, it had a tiny (star|heart) on it.

== broken.end > finish [hero has]
4 "Thank you!" said {hero}. {He} was so {+glad}.
3 "It is even better than before," said {hero}, and {he} felt {+glad}.
2 {hero} was {+glad}, and {friend} (clapped|cheered|whistled).
2 {hero} paid with a (song|kiss|big smile).
"""

TAKEN = """
== taken > taken.chase [thief has]
4 "Stop! Come back!" (cried|yelled) {hero}, but the {thief} ran away.
3 {hero} felt {+sad}. "That {thief} has my {noun}!" {he} said.
3 "Stop, thief!" shouted {friend}, but the {thief} did not (stop|listen).
2 The {thief} was gone before {hero} could (blink|say a word). {hero} was {+sad}.

== taken.chase > taken.found
4 They ran after the {thief}, (over a bridge|through a hedge|across a ditch).
3 They followed (small|muddy|strange) tracks.
3 They searched {+spot}, but they saw only {+junk}.
2 "I can hear something," whispered {friend}, and they tiptoed (closer|on).

== taken.found > taken.why ¶ [thief has]
4 They found the {thief} {+nook}.
3 There sat the {thief} with the {look} {noun}, {+nook}.
2 At last they (saw|spotted) the {thief} {+nook}. It looked (small|tired|cold).

== taken.why > taken.deal
3 "I only wanted (a friend|someone to play with)," it (said|whispered). [+lonely]
3 "I was so hungry," it (said|moaned). "I thought it was (lunch|a cake)." [+hungry]
3 if soft|wear: "My babies are (cold|freezing)," it (said|explained). "I wanted to keep them warm." [+cold]
3 if small|round: "It is so pretty," it said. "I wanted it for my (nest|collection)." [+pretty]

== taken.deal > taken.back
4 if lonely: "Then come and play with us," said {hero}.
4 if hungry: {hero} gave it {+snack}. "This tastes much better," {he} said.
4 if cold: {friend} brought some (straw|moss|wool) for the babies.
4 if pretty: {hero} gave it a (smooth pebble|bottle cap|shiny button) instead.
3 {hero} was not angry any more. "I understand," {he} said (softly|gently).
2 "Next time, please ask," said {friend}.

== taken.back > taken.end [thief gives hero]
4 The {thief} gave the {noun} back to {hero}.
3 "I am sorry," said the {thief}, and it gave {hero} the {noun}.
2 (Slowly|Carefully), the {thief} put the {noun} at {hero}'s feet.

== taken.end > finish [hero has]
4 {hero} was {+glad} to have the {look} {noun} again.
3 {hero} (smiled|grinned) and patted the {thief}. {He} felt {+glad}.
2 "Thank you," said {hero}. "Let us be friends."
"""

QUARREL = """
== quarrel > quarrel.think
3 {friend} (pulled|tugged), and {hero} pulled too.
3 {friend} was {+sad} and (walked|ran) away.
3 "Then I will not play with you," said {friend}, and {friend.he} (sat down alone|turned around).
2 They (shouted|argued) so loudly that the (birds|crickets) stopped singing.

== quarrel.think > quarrel.sorry [hero has]
4 {hero} sat {+nook} and thought. Playing alone was no fun.
3 {hero} looked at the {noun}. It was no fun without {friend}.
3 {A +creature} named {+helper} came by. "Two have more fun than one," {helper.he} said.
2 Suddenly {place} felt very (quiet|empty|cold), and {hero} was {+sad}.

== quarrel.sorry > quarrel.share ¶
4 "I am sorry, {friend}," said {hero}. "You are more important than {a noun}."
3 {hero} (ran|walked) to {friend} and said {he} was sorry.
3 "I was (selfish|unfair|mean)," said {hero}. "Will you (forgive me|play with me)?"

== quarrel.share > quarrel.turn [hero gives friend]
4 {hero} gave the {look} {noun} to {friend}. "Now it is your turn," {he} said.
3 Then {he} (gave|handed) {friend} the {look} {noun}.
2 "You may have it first," {he} said, and {he} gave {friend} the {look} {noun}.

== quarrel.turn > quarrel.end [friend gives hero]
4 {friend} (smiled|beamed). {friend.He} played with the {noun} and gave it back to {hero}.
3 "Thank you," said {friend}. Later {friend.he} gave the {noun} back to {hero}.
2 {friend} was careful with the {noun} and soon gave it back to {hero}.

== quarrel.end > finish
4 They took turns, and both of them were {+glad}.
3 {hero} was {+glad} that they were friends again.
2 Now they laughed (twice|three times) as much as before.
"""

FOUND = """
== found > found.whose [hero finds]
5 There {hero} found {a +look} {+noun} {+nook}.
3 "Look!" said {friend}. {hero} picked up {a +look} {+noun} that lay {+nook}.
2 {hero} almost (stepped|sat) on something {+nook}. It was {a +look} {+noun}!

== found.whose > found.ask
3 "I wonder whose it is," said {hero}.
3 {hero} wanted to keep it, but {he} knew that it belonged to somebody.
3 "Can we keep it?" asked {friend}. {hero} shook {his} head. "Somebody must miss it."
2 "Finders keepers," said {friend}. But {hero} did not think (so|that was right).

== found.ask > found.owner
4 They asked {a +creature} named {+helper}. "It is not mine," {helper.he} said.
3 They asked everyone at {place}, but nobody (knew|could say).
2 They put up a (sign|notice) and waited.
2 They looked {+spot}, but nobody was there.

== found.owner > found.back ¶
4 Then they saw {a +owner} who was crying. "I have lost my {noun}," {owner.he} said.
3 {A +owner} came (running|along). "Have you seen {a look} {noun}?" {owner.he} asked.
3 At last they met {a +owner}, who looked {+sad}. "My {noun} is gone," {owner.he} said.

== found.back > found.thanks [hero gives owner]
4 {hero} gave the {look} {noun} to the {owner}.
3 "Is this it?" asked {hero}, and {he} gave the {owner} the {look} {noun}.
2 "We found it {nook}," said {hero}, and {he} gave the {owner} the {look} {noun}.

== found.thanks > found.end [owner has]
4 "Thank you, thank you!" said the {owner}. {owner.He} gave {hero} {+snack}.
3 The {owner} was so {+glad} that {owner.he} (laughed|danced|sang).
3 "You are very honest," said the {owner}. "I got this {noun} from my {+elder}."

== found.end > finish
4 {hero} and {friend} felt {+glad}.
3 "You did the right thing, {hero}," said {friend}.
2 {hero} had no {noun} now, but {he} felt {+glad}. [owner has]
"""

BABY = """
== baby > baby.cry
4 There sat a tiny {+baby} {+nook}. It was (shivering|crying).
3 They heard a (small|soft) voice. {A +baby} was hiding {+nook}.
2 "What is that?" asked {friend}. {A +baby} sat {+nook}, all alone.

== baby.cry > baby.care
4 "Where is your mother?" asked {hero}. "I do not know," (sobbed|sniffed|peeped) the {baby}.
3 The {baby} was {+sad}. It had (lost its mother|followed a butterfly too far).
3 "I (went|wandered) too far, and now I am lost," said the {baby}.

== baby.care > baby.search
3 {hero} gave it {+snack} and (stroked|patted) its (head|back).
3 "Do not be afraid," said {friend}. "We will take you home."
2 {hero} wrapped the {baby} in {his} (towel|shirt|shawl) to keep it warm.
2 {friend} (sang|hummed) a (lullaby|gentle song) until the {baby} stopped crying.

== baby.search > baby.mother
4 They looked for its mother {+spot}, but they saw only {+junk}.
3 They asked {a +creature} named {+helper} for the way. "Go (left|north|uphill)," {helper.he} said.
2 {hero} carried the {baby} until {his} arms (ached|hurt).
2 {friend} found (tiny|fresh) footprints in the (mud|dust), and they followed them.

== baby.mother > baby.joy ¶
4 At last they heard somebody (call|weep). It was the mother of the {baby}!
3 "My child!" (cried|called) a voice. The mother of the {baby} came (running|at once).
2 Then the {baby} gave a (squeak|shout). There was its mother!

== baby.joy > baby.end
4 The {baby} (snuggled|ran) up to its mother.
3 "How can I ever thank you?" asked the mother. "Please come for {+treat}."
2 The mother (kissed|counted) the {baby} from head to (toe|tail).

== baby.end > finish
4 {hero} was {+glad}, and {friend} was {+glad} too.
3 {hero} and {friend} waved until the {baby} was out of sight.
2 "Well done, {hero}," said {friend}.
"""

PRESENT = """
== present > present.way [+present, hero gets]
4 {He} saved {his} (coins|pennies) and bought {a +look} {+noun}.
3 In a shop window, {he} saw {a +look} {+noun}. It was (perfect|just right), so {he} bought it.
3 For three days {he} worked in secret. Then {he} had made {a +look} {+noun}.
2 {His} {+elder} helped {him} to make {a +look} {+noun}. [+elder]

== present.way > present.worry ¶ [hero has]
4 On the way to the party, it began to (rain|snow|hail). {hero} hid the {noun} under {his} (coat|jacket|shirt).
3 On the way to the party, {hero} fell into a (puddle|ditch). The {noun} got (wet|muddy).
3 {He} wrapped the {noun} in (red paper|newspaper|a big leaf) and carried it to the party.
2 At the party, {hero} saw the other (gifts|presents). They were much bigger than the {noun}.

== present.worry > present.give
4 {hero} felt {+sad}. What if {friend} did not like it?
3 "Maybe it is not good enough," {he} (thought|whispered).
2 {He} almost turned around and went home.
2 {His} knees (shook|trembled) a little.

== present.give > present.thanks ¶ [hero gives friend]
4 {hero} gave the {look} {noun} to {friend}.
3 "Happy birthday, {friend}!" said {hero}, and {he} gave {friend.him} the {look} {noun}.
2 "This is for you," said {hero} (shyly|quietly), and {he} gave {friend} the {look} {noun}.

== present.thanks > present.end [friend has]
4 {friend} (gasped|squealed|cheered). "I love it!" {friend.he} said.
3 "This is the best gift of all," said {friend}.
3 "I always wanted {a noun}," said {friend}, and {friend.he} hugged {hero}.

== present.end > finish [friend has]
4 {hero} was {+glad}.
3 {friend} blew out the candles, and everyone (clapped|sang).
2 {hero} and {friend} played with the {noun} until (midnight|sunset|dinner).
"""
