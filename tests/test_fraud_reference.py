"""The handbook's 15 features on every one of its transactions, against plain pandas"""

import pytest
from test_fraud_features import FILE, assert_handbook, handbook


@pytest.mark.skipif(not FILE.is_file(), reason="needs the handbook's transactions (FINURE_DATA)")
def test_every_row_equals_pandas():
    assert_handbook(handbook())
