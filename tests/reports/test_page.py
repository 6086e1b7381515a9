import json

from fdl_bidsapp.reports.page import json_for_script


def test_data_cannot_end_its_script_and_comes_back_whole() -> None:
    data = {"a": "</script><script>x</script>", "b": "<!--", "c": "\u2028 & 'q' \"q\"", "d": None}
    text = json_for_script(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data
