"""Training rows written by a model behind an OpenAI-compatible endpoint: `megalite synthesize`.

config      what a recipe says
prompts     the built-in prompts
tasks       how a row is asked for: instructions, questions, paraphrases, back-translation, preferences
endpoint    requests: retries, back-off, what they cost
answers     the append-only file of answers, which is what a killed run goes on from
checks      why a row is refused: duplicates, contamination, length, language
run         from slots to rows, in an order that does not depend on which answer comes first
report      counts by reason, and costs"""
