"""A server of edits that speaks OpenAI's images API: `varedit-serve BUNDLE`.

The parent process answers HTTP and never edits; child processes, by default one, hold an editor
each. What a request passes, in order:

    guard.py     who may ask: Host, Origin, API key (keys.py); every answer is counted and logged
    asked.py     what is known of it for the log: its id, key and error
    body.py      a form or JSON, read within limits of bytes and time
    fields.py    the table of all fields: parsing, checks, and openapi.py
    edits.py     the endpoint: admission (budget.py), pictures in and out
    answering/   answers.py: results as JSON, bytes or events
                 moderation.py: an operator's own code that judges prompts and pictures
                 provenance.py: a signed statement in each picture (C2PA), if wanted
    editing/     queue.py: pictures that wait, batches, what runs again after a fault
                 child.py: a child as the parent sees it, started, fed, watched, replaced
                 workers.py: several children, which have the machine's cores and GPUs between them
                 replicas.py: children on a Ray cluster
                 worker.py: a child's own program; messages.py: what both tell each other

`cli.py` is the command, `server.py` listens and drains, `on_ray.py` is an application for Ray
Serve's own proxies, `app.py` joins the parts, `limits.py` has all limits with their defaults,
`errors.py` errors as clients see them, `page/` the web page.
"""
