"""A judge: a model behind an OpenAI-compatible chat endpoint looks at edits and scores them.

`protocols.py` says what is asked and how scores are made of the answers, `prompts/` in which words;
`replies.py` reads answers, `endpoint.py` gets them, `judge.py` is the metric.
"""
