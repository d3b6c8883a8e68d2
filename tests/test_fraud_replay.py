"""Half a year of the handbook's transactions, one at a time, against the batch driver"""

import numpy as np
import pytest
from test_fraud_features import FILE, columns, handbook
from test_fraud_online import assert_equal, replay

from finure.core import generator
from finure.fraud.online import Online


@pytest.mark.skipif(not FILE.is_file(), reason="needs the handbook's transactions (FINURE_DATA)")
def test_half_a_year_one_at_a_time():
    "A twentieth of the customers, drawn by seed, over all 183 days; `make bench-fraud` replays every row."
    frame = handbook()
    drawn = generator(20, "customers").choice(frame.customer_id.unique(), 250, replace=False)
    frame = frame[frame.customer_id.isin(drawn)]
    jitter = generator(21, "known").choice([0, 1, 3], len(frame)).astype("timedelta64[D]")
    table = columns(frame.assign(known_time=frame.known_time + jitter))
    assert len(np.unique(table.time // 86400)) == 183
    assert_equal(replay(Online(), table), table)
