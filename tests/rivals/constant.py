"""The limit: uvicorn with nothing behind it, the same answer to everything"""

BODY = b'{"id":1000001,"pd":0.05,"decision":"approve"}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]


async def app(scope, receive, send):
    "Reads the body and answers."
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})
