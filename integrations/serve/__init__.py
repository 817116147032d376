"""A server that speaks OpenAI's protocol: `spiffy-serve` (docs/serving.md).

`engine` is the one thread that owns the model, `api` what may be asked, `app` how it is asked over
HTTP, `events` what is sent back, `metrics` what is counted, `listen` the sockets, `warm_up` what is
done before the first request. Needs the extra `serve`.
"""
