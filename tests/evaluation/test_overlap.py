from fnsft_trl.evaluation.overlap import SharedRows, written


def test_the_pieces_of_every_form_of_a_row():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    assert written("a") == ["a"]
    assert written({"text": "a", "source": "x"}) == ["a"]
    assert written({"prompt": "a", "completion": "b", "id": "7"}) == written(turns) == ["a", "b"]
    assert written({"messages": turns, "tools": None}) == ["a", "b"]
    assert written({"question": "a", "answer": " "}) == ["a"]


def test_shared_rows_are_found_as_a_whole_or_as_a_part():
    series = {
        "wiki": ["A sea.", "the  RED fox", "none"],
        "qa": [{"prompt": "Who?", "completion": "The fox."}, {"prompt": "Who?", "completion": "A hen."}],
        "free": ["nothing of it"],
    }
    train = [
        {"text": "The red\nfox"},
        {"prompt": "Who?", "completion": "The fox."},
        {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "a sea."}]},
    ]
    assert SharedRows(series).among(train) == {"wiki": ["A sea.", "the RED fox"], "qa": ["Who? The fox."]}
    assert SharedRows(series).among(train, most=1) == {"wiki": ["the RED fox"]}
