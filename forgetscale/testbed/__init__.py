"""A small world, made from a seed, where forgetting can be measured exactly.

No text, model or network is needed: words, grammar, facts, chat, tasks, tokenizer and an untrained
model all follow from the seed. Another seed is another world, and every method meets the same ones.

**Languages.** The source language puts subject, verb, object; the target language subject, object,
verb. No word belongs to both. "Yesterday the old baker sold the bread near the bridge" is, in
world 0 (concepts: ``words.py``; sounds and endings: ``languages.py``; grammar: ``text.py``):

    src  farli don sislis raltor sosal don rival no don novor.
         yesterday the old baker sell the bread near the bridge
    tgt  zẹwẹk kpangyung yọpkpọ gungkpang hang zọyẹyọ gagupwẹ.
         baker old yesterday bridge near bread-OBJECT sell-PAST

Source nouns take a plural ending and verbs agree with it; target verbs carry tense, objects a case
ending. Proper names (capitalised) are the same in both.

**Knowledge.** Persons have a city, a job and a pet; cities a river, a mayor and a dish; rivers a
colour: 208 facts the source model learns, each relation with five questions and three statements.
The target text states 36 facts of its own: cities and jobs of new persons, and which instrument
some of the known persons play. It never restates a source fact, so nothing in it refreshes one.
``world.json`` keeps lexicons, entities, relations with all templates, and facts with a
``split`` (``train``, ``dev``, ``test``) and a ``domain`` (``in``, ``out``, by relation).

**What the source model reads** is ``chat/train.jsonl`` alone: questions on facts (never with one
held-out template per fact), instructions a program can check (repeat, order, name, yes or no, start
with, end with, whole sentence), unsafe requests that are refused, harmless requests of the same
form or about the same deeds that are not, tales, and pages of raw text. ``chat/calibration.jsonl``
is another sample of the same chat. ``text/`` holds raw text of both languages as MADLAD-400 stores
it; most target pages end with a question, and its answer, on a fact the page does not state.

**Tasks.** ``recall`` asks every source fact with its held-out template (seen with other facts
only); ``compliance``, ``refusal``, ``over_refusal`` and ``code_mixing`` use prompts that training
never shows; ``target_recall`` asks every target fact in the target language, in chat and, in
``meta.raw_prompt``, as raw text.

**Tokenizer.** Byte-level fall-back and byte-pair merges learnt on mostly source text, as in
English-centred models: about 1.25 pieces for a source word, 3.1 for a target word. The end of a
turn is also the end of a document, ``<|end|>``, as in OLMo 2.

**Model.** ``init/`` is an ``Olmo2ForCausalLM`` of 1.07 M parameters with random weights. Training
it is the engine's work: AdamW (lr 5e-3, cosine, 5 % warm-up) over 1200 steps of 16 rows of 64
tokens brings recall above 0.97 and compliance above 0.8.
"""

from forgetscale.testbed.build import build_world, ensure_world, world_path
from forgetscale.testbed.size import TINY, WorldSize

__all__ = ["TINY", "WorldSize", "build_world", "ensure_world", "world_path"]
