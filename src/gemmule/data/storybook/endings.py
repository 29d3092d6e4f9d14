"""How stories end: a quiet moment, what was learned, and a last sentence.

The notation is explained in `grammar.py`.
"""

ENDING = """
== finish > closing ¶
5 They {+went} home and (ate|shared|had) {+tasty} {+treat}.
4 That evening, {hero} and {friend} ate {+tasty} {+treat} (by the fire|on the porch|under the moon|in bed).
4 That night, {hero} dreamed of {a +strange} {+sight}.
3 if elder: At home, {hero} told {his} {elder} (everything|the whole story|about it).
2 if out: Then they {+went} home from {place} (hand in hand|side by side|in the dusk).
3 if own: That night, {hero} fell asleep with the {look} {noun} beside {his} bed. [hero has]
2 if hobby: Now there was (still|even) time to {hobby}.
2 "What a {+weather} day!" said {friend}, and {hero} {+laughed}.
4 if lost: From that day on, {hero} always kept the {noun} in a (safe|secret|special) place. [hero has] > end
3 if lost: {hero} learned to (take better care of|look after) {his} things. > end
4 if stuck: {hero} learned that it is (fine|good|wise) to ask for help. > end
3 if high: After that, {hero} only took the {noun} out on (calm|still) days. [hero has] > end
3 if deep: After that, {hero} never let the {noun} out of {his} sight. [hero has] > end
4 if broken: {hero} learned that (almost everything|most things) can be mended. > end
3 if broken: After that, {hero} was {+very} careful with the {noun}. [hero has] > end
4 if taken: {hero} learned that a kind word works better than (anger|shouting). > end
2 if taken: And the {thief} never took anything again without asking. > end
2 if taken: From then on, the {thief} (visited|played with|waited for) them every {+time}. > end
4 if quarrel: {hero} learned that sharing makes everything twice as (nice|good|sweet). > end
3 if quarrel: From then on, they always took turns with the {noun}. > end
4 if found: {hero} learned that it feels good to be (honest|kind|helpful). > end
3 if found: And the {owner} {+laughed} every time they met. > end
4 if baby: {hero} learned that even the smallest can (help|be brave). > end
3 if baby: And the {baby} came to visit {hero} every {+season}. > end
4 if present: {hero} learned that a gift from the heart is the best. > end
3 if present: {friend} kept the {noun} for {+number} years. [friend has] > end

== closing > end
8 The end.
4 And they all lived happily ever after.
1 What {a trait} {kind} {hero} was!
3 And that is the end.
2 Sleep (well|tight), little {kind}!
3 Good night, {hero} and {friend}.
2 And perhaps they are (laughing|dancing|dreaming) still.
"""
