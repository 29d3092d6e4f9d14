"""How stories end: a quiet moment, what was learned, and a last sentence.

The notation is explained in `grammar.py`.
"""

ENDING = """
== finish > closing ¶
5 They went home and (ate|shared) {+treat}.
4 That evening, {hero} and {friend} (ate|enjoyed) {+treat} (by the fire|on the porch|under the moon).
3 if elder: At home, {hero} told {his} {elder} (everything|the whole story).
3 if out: Then they walked home from {place} (hand in hand|side by side).
3 if own: That night, {hero} fell asleep with the {look} {noun} beside {his} bed. [hero has]
3 if hobby: Now there was (still|even) time to {hobby}.
2 {hero} and {friend} (laughed|talked|sang) all the way home.
2 "What a day!" said {friend}, and {hero} (agreed|nodded|yawned).
4 if lost: From that day on, {hero} always kept the {noun} in a safe place. [hero has]
3 if lost: {hero} learned to (take better care of|look after) {his} things.
5 if stuck: {hero} learned that it is (fine|good|wise) to ask for help.
3 if high: After that, {hero} only took the {noun} out on (calm|still) days. [hero has]
3 if deep: After that, {hero} never let the {noun} out of {his} sight. [hero has]
5 if broken: {hero} learned that (almost everything|most things) can be mended.
3 if broken: After that, {hero} was (much|always) more careful with the {noun}. [hero has]
4 if taken: {hero} learned that a kind word works better than (anger|shouting).
3 if taken: And the {thief} never took anything again without asking.
2 if taken: From then on, the {thief} (visited|played with) them every (week|month).
5 if quarrel: {hero} learned that sharing makes everything twice as (nice|good).
3 if quarrel: From then on, they always took turns with the {noun}.
5 if found: {hero} learned that it feels good to be honest.
3 if found: And the {owner} waved every time they met.
5 if baby: {hero} learned that even the smallest can (help|be brave).
3 if baby: And the {baby} came to visit {hero} every (spring|year).
5 if present: {hero} learned that a gift from the heart is the best.
3 if present: {friend} kept the {noun} (forever|on a shelf). [friend has]

== closing > end
8 The end.
4 And they all lived happily ever after.
2 What {a trait} {kind} {hero} was!
2 And that is the end of the story.
2 Good night, {hero}. Good night, {friend}.
1 if out: If you go to {place}, you may still (meet them|hear them laugh) there.
1 And if they are not asleep yet, they are (laughing|dancing|dreaming) still.
"""
