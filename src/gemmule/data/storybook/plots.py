"""What happens in the middle: things are lost and found, stuck and freed, broken and mended, taken and given back,
quarrelled over and shared; somebody else's thing is returned, a baby animal is brought home, a present is made.

The notation is explained in `grammar.py`.
"""

LOST = """
== lost > lost.search
5 {hero} felt {+very} {+sad}.
3 {hero} began to cry. {He} was {+very} {+sad}. > lost.comfort
3 "I have lost my {noun}!" {+sobbed} {hero}.
2 A (big|fat|salty) tear rolled down {hero}'s (cheek|nose).
2 "It is gone," {+sobbed} {hero}, and {he} felt {+sad}.

== lost.comfort > lost.search
4 "Do not (worry|cry)," {friend} said {+softly}. "We will find it."
3 "I will help you," {friend} said {+softly}.
3 {friend} {+hugged} {him} and said they would search until (sunset|dark|supper). > lost.turn
2 "Where did you (see|have|leave) it last?" {friend} asked {+softly}. > lost.turn
2 "Four eyes see more than two," {friend} {+said}.

== lost.search > lost.turn
6 They {+looked} {+spot}, but they found only {a +shabby} {+junk}.
4 First they {+looked} {+spot}. There was nothing but {a +shabby} {+junk}.
3 {hero} {+looked} {+spot} and found {a +shabby} {+junk}, but no {noun}.
3 {friend} {+looked} {+spot}. "I see only {a +shabby} {+junk}," {friend.he} {+sobbed}.
2 They asked {+number} people. Nobody had seen the {look} {noun}.

== lost.turn > joy ¶
4 {+Then} {friend} looked {+nook}. There was the {look} {noun}! [friend finds] > friend.gives
3 "Over here!" {+cried} {friend}, who had found the {look} {noun} {+nook}. [friend finds] > friend.gives
4 {+Then} {hero} found the {look} {noun} {+nook}. [hero finds]
3 {hero} looked up and saw something {+nook}. It was the {look} {noun}! [hero finds]
5 {+Then} {a +wise} {+creature} named {+helper} came along with the {look} {noun}.
  [+near, creature finds] > creature.gives
4 They met {a +wise} {+creature} named {+helper}, who had found the {noun} {+nook}.
  [+near, creature finds] > creature.gives
3 "Is this your {look} {noun}?" asked {a +wise} {+creature}. [+near, creature finds] > creature.gives

== friend.gives > joy [friend gives hero]
4 {friend} {+softly} gave the {noun} back to {hero}.
3 "Here you are," {+said} {friend} and gave {hero} the {noun}.
2 {friend} (wiped|brushed) off the (dust|mud) and gave the {noun} to {hero}.
2 {friend} {+went} over and put the {noun} in {hero}'s (arms|lap).

== creature.gives > joy [creature gives hero]
4 The {creature} {+softly} gave the {noun} back to {hero}.
3 "That is my {noun}!" {+cried} {hero}, and the {creature} gave it to {him}.
3 "Here you are," {+said} the {creature} and gave {hero} the {noun}.
2 if lost: "I kept it (safe|dry|warm)," {+said} the {creature} and gave {hero} the {noun}.
2 if stuck: "That was (easy|fun)," (laughed|panted) the {creature} and gave {hero} the {noun}.

== joy > finish [hero has]
4 {hero} {+hugged} the {noun}. {He} was {+very} {+glad}.
4 {hero} was so {+glad} that {he} {+jumped} (around|up and down).
3 "{+Hooray}!" {+cried} {hero}, and {he} felt {+very} {+glad}.
3 "Thank you, {friend}," {+said} {hero}. {friend} was {+very} {+glad} too.
3 "{+Hooray}!" they {+cried} together.
"""

STUCK = """
== stuck > stuck.try
4 "{+Oh}! My {noun}!" {+cried} {hero}.
3 {hero} felt {+very} {+sad}.
3 if high: They (stared|looked|pointed) up. The {noun} was (much|far) too high.
3 if deep: They (peered|looked|leaned) down. The {noun} was (much|far) too deep.
2 {hero} was so {+sad} that {he} (could not speak|sat down and cried).

== stuck.try > stuck.help
3 if high: {friend} {+jumped} as high as {friend.he} could, but it was no use.
3 if high: {hero} stood on {friend}'s (shoulders|back), but {he} could not reach it.
3 if high: They threw {a +shabby} {+junk} at it, but the {noun} (did not move|only wobbled).
3 if deep: {hero} (stretched|reached) down, but {his} arm was too short.
3 if deep: {friend} tried with a (stick|ladle|rake|fishing rod), but {friend.he} only pushed it deeper.
3 if deep: They lowered a hook on a (rope|thread), but it brought up {a +shabby} {+junk}.
2 "We should ask somebody for help," {friend} said {+softly}.

== stuck.help > creature.gives ¶
4 {+Then} {a +wise} {+creature} named {+helper} came by and got the {look} {noun}. [creature finds]
3 "I can help," {+said} {a +wise} {+creature}. Soon the {creature} had the {look} {noun}. [creature finds]
2 They asked {a +wise} {+creature} named {+helper}, who {+softly} got the {look} {noun}. [creature finds]
4 {friend} made a (ladder|long hook) out of (branches|old boards|rope) and got the {look} {noun}. [friend finds]
  > friend.gives
2 if high: After {+number} minutes, the {look} {noun} (fell|dropped) right into {hero}'s arms. [hero finds] > joy
2 if deep: {hero} dug with a (shovel|clam shell|spoon) and got the {look} {noun} back. [hero finds] > joy
"""

BROKEN = """
== broken > broken.help
4 {hero} was {+sad}. "My (poor|dear) {noun}!" {he} {+sobbed}. > broken.comfort
3 {hero} {+hugged} the {noun} and felt {+very} {+sad}. > broken.comfort
3 "It is (ruined|spoiled|useless)!" {+sobbed} {hero}. > broken.comfort
3 "{+Oh}!" {+cried} {hero}. {He} was {+very} {+sad}.

== broken.comfort > broken.help
4 "(Perhaps|Maybe) somebody can (fix|mend|repair) it," {friend} said {+softly}.
3 "I am so sorry," {friend} said {+softly}.
2 "Do not (throw it away|give up|cry)," {friend} said {+softly}. "I have an idea."
2 {friend} {+hugged} {hero} and thought (hard|quickly) about what to do.

== broken.help > broken.work ¶ [hero gives mender]
5 They {+went} to {a +busy} {+mender} and gave {mender.him} the {look} {noun}.
3 {friend} knew {a +busy} {+mender}. {hero} gave {mender.him} the {look} {noun}.
2 Down the road, {a +busy} {+mender} had a workshop. {hero} gave {mender.him} the {look} {noun}.

== broken.work > broken.back
4 if hard|wheels: The {mender} {+softly} mended it with (glue|a hammer|screws|paint).
4 if fragile: The {mender} {+softly} glued the (pieces|bits) together.
4 if soft|wear: The {mender} {+softly} mended it with (blue|strong|silver) (thread|yarn).
4 if paper: The {mender} {+softly} mended it with (tape|paste|ribbons).
2 The {mender} put on (thick glasses|a big apron|gloves) and worked for {+number} hours.
2 "This needs (a steady hand|time|love)," the {mender} said {+softly}.

== broken.back > broken.end [mender gives hero]
4 {+Then} {mender.he} gave the {noun} back to {hero}.
3 "Here you are," {+said} the {mender} and gave {hero} the {noun}.
2 When {hero} got the {noun} back, it had {+number} tiny (stars|hearts|dots) on it.

== broken.end > finish [hero has]
4 "It is as good as new!" {+cried} {hero}. {He} was {+very} {+glad}.
3 "It is even better than before," {+said} {hero}, and {he} felt {+glad}.
3 {hero} was {+very} {+glad}, and {friend} {+laughed}.
2 {hero} paid with (a song|a big smile|a cookie|a joke).
"""

TAKEN = """
== taken > taken.chase [thief has]
4 "(Stop|Come back|Wait)!" {+cried} {hero}, but the {thief} ran away.
3 {hero} felt {+very} {+sad}. "That {thief} has my {noun}!" {he} {+sobbed}. > taken.found
3 "Stop, thief!" {+cried} {friend}, but the {thief} did not (stop|listen|turn around). > taken.found
2 The {thief} was gone before {hero} could (blink|move|say a word).

== taken.chase > taken.found
4 They {+went} after the {thief}, (over a bridge|through a hedge|across a ditch|past a shed).
3 They followed {+number} (small|muddy|fresh) tracks.
4 They {+looked} {+spot}, but they saw only {a +shabby} {+junk}.
2 "I can hear something," {friend} said {+softly}.

== taken.found > taken.why ¶ [thief has]
4 {+Then} they found the {thief} {+nook}.
3 There sat the {thief} with the {look} {noun}, {+nook}.
2 {+Then} they saw the {thief} {+nook}. It looked {+very} {+sad}.

== taken.why > taken.deal
3 "I only wanted (a friend|somebody to play with)," it {+sobbed}. [+lonely]
3 "I was so hungry," it {+sobbed}. "I thought it was (lunch|a cake|a fruit)." [+hungry]
4 if soft|wear: "My babies are (cold|freezing|shivering)," it {+sobbed}. [+cold]
4 if small|round: "It is so pretty," it {+sobbed}. "I wanted it for my (nest|collection|birthday)." [+pretty]

== taken.deal > taken.back
4 if lonely: "Then come and play {+game} with us," {+said} {hero}.
4 if hungry: {hero} gave it {a +ripe} {+snack}.
4 if cold: {friend} brought some (straw|moss|wool|leaves) for the babies.
4 if pretty: {hero} gave it a (smooth pebble|bottle cap|shiny nail|glass bead) instead.
3 "I understand," {hero} said {+softly}.
2 "Next time, please ask," {friend} said {+softly}.

== taken.back > taken.end [thief gives hero]
4 The {thief} {+softly} gave the {noun} back to {hero}.
3 "I am sorry," {+sobbed} the {thief} and gave {hero} the {noun}.

== taken.end > finish [hero has]
4 {hero} was {+very} {+glad} to have the {look} {noun} again.
3 {hero} {+laughed} and patted the {thief}. {He} felt {+glad}.
2 "Let us be friends," {hero} said {+softly}.
"""

QUARREL = """
== quarrel > quarrel.think
3 {friend} (pulled|tugged), and {hero} pulled too.
3 {friend} was {+very} {+sad} and {+went} away.
3 "Then I will not play with you," {friend} {+sobbed}.
2 They (shouted|argued) so loudly that the (birds|crickets|bees) flew away.

== quarrel.think > quarrel.sorry [hero has]
4 {hero} sat {+nook} and felt {+very} {+sad}.
3 {hero} looked at the {noun}. It was no fun without {friend}.
3 {A +wise} {+creature} named {+helper} said {+softly}, "Two have more fun than one." [+near]
2 {+Suddenly} everything felt {+very} (quiet|empty|cold|dark).

== quarrel.sorry > quarrel.share ¶
4 "I am sorry, {friend}," {+said} {hero}. "You are more important than {a noun}."
3 {hero} {+went} to {friend} and said {he} was sorry.
3 "I was (selfish|unfair|mean|wrong)," {hero} {+sobbed}.

== quarrel.share > quarrel.turn [hero gives friend]
4 {hero} gave the {look} {noun} to {friend}. "Your turn," {he} said {+softly}.
3 {+Then} {he} {+softly} gave {friend} the {look} {noun}.
2 "You may have it for {+number} minutes," {he} {+said} and gave {friend} the {noun}.

== quarrel.turn > quarrel.end [friend gives hero]
4 {friend} {+laughed}, played with the {noun}, and gave it back to {hero}.
3 "{+Hooray}," said {friend}. Later {friend.he} gave the {noun} back to {hero}.
2 After {+number} minutes, {friend} {+softly} gave the {noun} back to {hero}.

== quarrel.end > finish
4 They took turns, and both of them were {+very} {+glad}.
3 {hero} was {+very} {+glad} that they were friends again.
2 Now they had {+number} times as much fun as before.
"""

FOUND = """
== found > found.whose [hero finds]
5 There {hero} found {a +look} {+noun} {+nook}.
3 "Look!" {+cried} {friend}. {hero} picked up {a +look} {+noun} that lay {+nook}.
2 {hero} almost (stepped|sat) on {a +look} {+noun} {+nook}.

== found.whose > found.owner
3 "I wonder whose it is," {hero} said {+softly}. > found.ask
3 {hero} wanted to keep it, but {he} knew that it belonged to somebody.
3 "Can we keep it?" asked {friend}. "Somebody must miss it," {+said} {hero}.
2 "Finders keepers," {+said} {friend}, but {hero} did not think so. > found.ask

== found.ask > found.owner
4 They asked {a +wise} {+creature} named {+helper}. "It is not mine," {+said} the {creature}. [+near]
3 They asked {+number} people, but nobody (knew|could say).
2 They put up a (sign|notice|flag) and waited for {+number} hours.
3 They {+looked} {+spot}, but they saw only {a +shabby} {+junk}.

== found.owner > found.back ¶
4 {+Then} {a +busy} {+owner} {+sobbed}, "I have lost my {noun}!"
3 "Have you seen {a look} {noun}?" asked {a +busy} {+owner}.
3 {+Then} they met {a +busy} {+owner} who looked {+very} {+sad}. "My {noun} is gone," {owner.he} {+sobbed}.

== found.back > found.thanks [hero gives owner]
4 {hero} {+softly} gave the {owner} the {look} {noun}.
3 "Is this it?" asked {hero} and gave the {owner} the {look} {noun}.
2 "We found it (here|nearby|on our way)," {+said} {hero} and gave the {owner} the {noun}.

== found.thanks > found.end [owner has]
4 "{+Hooray}!" {+cried} the {owner}, and {owner.he} gave {hero} {a +ripe} {+snack}.
3 The {owner} was so {+glad} that {owner.he} {+laughed}.
3 "I got this {noun} from my {+elder}," {+said} the {owner}, and {owner.he} {+hugged} {hero}.

== found.end > finish
4 {hero} and {friend} felt {+very} {+glad}.
3 "You did the right thing, {hero}," {friend} said {+softly}.
2 {hero} had no {noun} now, but {he} felt {+very} {+glad}. [owner has]
"""

BABY = """
== baby > baby.cry
4 There sat a small {+baby} {+nook}. It looked {+very} {+sad}. > baby.care
3 They heard a (small|soft|thin) voice. A lost {+baby} was hiding {+nook}. > baby.care
2 "What is that?" asked {friend}. A tiny {+baby} sat {+nook}.

== baby.cry > baby.care
4 "Where is your mother?" asked {hero}. "I do not know," {+sobbed} the {baby}.
3 It had (lost its mother|followed a butterfly|run after a cloud) and was lost.
3 "I {+went} too far, and now I am lost," {+sobbed} the {baby}.

== baby.care > baby.search
4 {hero} gave it {a +ripe} {+snack} and {+hugged} it.
3 "Do not be afraid," {friend} said {+softly}. "We will take you home."
2 {hero} {+softly} wrapped the {baby} in {his} (towel|shirt|shawl|coat).
3 {friend} told it about {a +strange} {+sight} until it {+laughed}.

== baby.search > baby.mother
4 They looked for its mother {+spot}, but they saw only {a +shabby} {+junk}.
4 They asked {a +wise} {+creature} named {+helper}. "Go (left|north|uphill)," {+said} the {creature}. [+near]
2 {hero} carried the {baby} for {+number} miles until {his} arms (ached|hurt).
2 {friend} found {+number} (tiny|fresh) footprints, and they followed them.

== baby.mother > baby.joy ¶
4 {+Then} they heard somebody (call|weep|sing). It was the mother of the {baby}!
3 "My child!" {+cried} the mother of the {baby}.
3 {+Number} minutes later, the {baby} saw its mother {+nook}.

== baby.joy > baby.end
3 The {baby} (snuggled|ran|cuddled) up to its mother.
3 "{+Hooray}!" {+cried} the mother, and she gave them {+tasty} {+treat}.
3 The mother {+hugged} the {baby} and was {+very} {+glad}.

== baby.end > finish
4 {hero} was {+very} {+glad}, and {friend} {+laughed}.
3 {hero} and {friend} waved until the {baby} was (out of sight|gone|asleep).
2 "Well done, {hero}," {friend} said {+softly}.
"""

PRESENT = """
== present > present.way [hero gets]
4 {He} saved {his} (coins|pennies|allowance) and bought {a +look} {+noun}.
3 In a shop, {he} bought {a +look} {+noun}. It was (perfect|just right|not too dear).
3 For {+number} days {he} worked in secret. Then {he} had made {a +look} {+noun}.
2 {His} {+elder} helped {him} to make {a +look} {+noun}. [+elder]

== present.way > present.worry ¶ [hero has]
4 On the way, it began to (rain|snow|hail). The {noun} got {+very} (wet|dirty|cold).
3 On the way, {hero} fell into a (puddle|ditch|bush), and the {noun} got {+very} (wet|dirty|scratched).
3 {He} wrapped the {noun} in (red paper|newspaper|a big leaf) and {+went} to the party.
2 At the party, {hero} saw {+number} other (gifts|presents). They were much bigger.

== present.worry > present.give
4 {hero} felt {+very} {+sad}. What if {friend} did not like it?
3 "Maybe it is not good enough," {he} {+sobbed}.
2 {He} was so {+sad} that {he} almost (turned around|went home|ran away).
2 {His} knees (shook|trembled), and {he} felt {+very} {+sad}.

== present.give > present.thanks ¶ [hero gives friend]
4 {hero} {+softly} gave the {look} {noun} to {friend}.
3 "Happy birthday!" {+cried} {hero} and gave {friend} the {look} {noun}.
2 "This is for you," {hero} said {+softly} and gave {friend} the {look} {noun}.

== present.thanks > present.end [friend has]
4 "{+Hooray}!" {+cried} {friend} and {+hugged} {hero}.
3 "This is the best gift of all," {friend} {+said}.
3 "I always wanted {a noun}," {+said} {friend} and {+laughed}.

== present.end > finish [friend has]
4 {hero} was {+very} {+glad}.
3 {friend} blew out {+number} candles, and everyone {+laughed}.
2 Then they played {+game} until (midnight|sunset|dinner).
"""
