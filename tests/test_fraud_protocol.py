"""The fraud protocol by hand-computed cases: who is tested when, which cards are called, what could have been found"""

import numpy as np
import pytest

from finure.core import FinureError
from finure.fraud.protocol import (
    CardDay,
    Figures,
    card_days,
    card_precision,
    evaluate_fold,
    fold_as_of,
    prequential,
    split,
    summary,
)

DAYS = 30


def payments(frauds, cards=6):
    "One payment per card and day; `frauds` are pairs of day and card."
    day, card = np.repeat(np.arange(DAYS), cards), np.tile(np.arange(cards), DAYS)
    return day, card, np.array([int((d, c) in frauds) for d, c in zip(day.tolist(), card.tolist(), strict=True)])


def cards_tested(fold, day, card):
    "The cards tested on each day."
    return {d: sorted(card[fold.test][day[fold.test] == d].tolist()) for d in np.unique(day[fold.test]).tolist()}


def test_weeks_of_the_default_split():
    day, card, fraud = payments({(0, 0)})
    fold = split(day, card, fraud, 2)
    assert (day[fold.train].min(), day[fold.train].max()) == (2, 8)
    assert (day[fold.test].min(), day[fold.test].max()) == (16, 22)


def test_a_card_known_from_training_is_never_tested():
    day, card, fraud = payments({(3, 1)})
    assert all(cards == [0, 2, 3, 4, 5] for cards in cards_tested(split(day, card, fraud, 0), day, card).values())


def test_a_card_known_before_training_is_tested():
    day, card, fraud = payments({(1, 1)})
    assert cards_tested(split(day, card, fraud, 5), day, card)[19] == [0, 1, 2, 3, 4, 5]


def test_a_card_leaves_when_its_fraud_is_a_delay_old_and_one_day():
    "Training days 0 to 6, test from day 14: on test day d the frauds up to day d - 8 are known."
    day, card, fraud = payments({(6, 0), (7, 1), (8, 2), (12, 3), (13, 4)})
    by_day = cards_tested(split(day, card, fraud, 0), day, card)
    assert by_day[14] == [1, 2, 3, 4, 5]
    assert by_day[15] == [2, 3, 4, 5]
    assert by_day[16] == [3, 4, 5] == by_day[19]
    assert by_day[20] == [4, 5]


def test_frauds_of_the_test_week_itself_remove_nobody_within_seven_days():
    day, card, fraud = payments({(14, 5), (15, 5)})
    assert all(5 in cards for cards in cards_tested(split(day, card, fraud, 0), day, card).values())


def test_a_shorter_delay_brings_the_test_forward_and_the_knowledge_too():
    day, card, fraud = payments({(4, 0), (5, 1)})
    by_day = cards_tested(split(day, card, fraud, 0, train_days=3, delay=2, test_days=4), day, card)
    assert list(by_day) == [5, 6, 7, 8]
    assert by_day[6] == [0, 1, 2, 3, 4, 5]
    assert by_day[7] == [1, 2, 3, 4, 5]
    assert by_day[8] == [2, 3, 4, 5]


def test_prequential_goes_back_week_by_week():
    day, card, fraud = payments({(d, d) for d in range(DAYS)}, cards=60)
    folds = prequential(day, card, fraud, 8, folds=2)
    assert [fold.start for fold in folds] == [8, 1]
    assert [day[fold.train].min() for fold in folds] == [8, 1]


@pytest.mark.parametrize(("frauds", "names"), [({(15, 1)}, "training week"), ({(0, 1)}, "test week")])
def test_a_fold_without_fraud_is_named(frauds, names):
    with pytest.raises(FinureError, match=f"{names} of the fold that starts on day 0"):
        prequential(*payments(frauds), 0, folds=1)


def test_the_newest_fold_whose_labels_are_known():
    day, card, fraud = payments({(d, d) for d in range(DAYS)}, cards=60)
    fold = fold_as_of(day, card, fraud, as_of=29)
    assert (day[fold.train].min(), day[fold.train].max()) == (1, 7)
    assert (day[fold.test].min(), day[fold.test].max()) == (15, 21)
    with pytest.raises(FinureError, match="as_of: the 28 days before"):
        fold_as_of(day, card, fraud, as_of=12)


def test_card_precision_counts_cards_and_removes_the_found():
    day = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    card = np.array([7, 7, 8, 9, 7, 8, 9, 8, 9])
    fraud = np.array([0, 1, 0, 1, 1, 1, 0, 1, 1])
    score = np.array([0.2, 0.9, 0.8, 0.1, 1.0, 0.1, 0.5, 0.4, 0.6])
    # day 0: called 7 (0.9) -> found; compromised 7, 9. day 1: 7 is gone; called 9 -> not; compromised 8.
    # day 2: called 9 -> found; compromised 8, 9
    days = card_days(day, card, fraud, score, k=1)
    assert days == [CardDay(0, 3, 2, 1, 1), CardDay(1, 2, 1, 0, 1), CardDay(2, 2, 2, 1, 1)]
    assert card_precision(days, 1) == (2 / 3, 1.0)
    # k = 2: day 0 finds 7 of {7, 8}; day 1 finds 8 of {9, 8}; day 2: both are left but 8 was found, 9 is found
    days = card_days(day, card, fraud, score, k=2)
    assert [d.found for d in days] == [1, 1, 1] and [d.attainable for d in days] == [2, 1, 1]
    assert card_precision(days, 2) == (0.5, (2 + 1 + 1) / 6)


def test_a_detected_card_is_not_called_in_place_of_another():
    day, card = np.array([0, 0, 1, 1]), np.array([1, 2, 1, 2])
    days = card_days(day, card, np.array([1, 0, 1, 1]), np.array([0.9, 0.1, 0.9, 0.1]), k=1)
    assert [d.found for d in days] == [1, 1]


def test_more_calls_than_cards_find_all_there_is():
    days = card_days(np.zeros(3, int), np.array([1, 2, 3]), np.array([0, 1, 1]), np.zeros(3), k=100)
    assert card_precision(days) == (0.02, 0.02)


def test_k_must_be_a_card():
    with pytest.raises(FinureError, match="k = 0"):
        card_days(np.zeros(1, int), np.zeros(1, int), np.zeros(1, int), np.zeros(1), k=0)


def test_figures_of_a_perfect_and_of_a_useless_model():
    day, card, fraud = payments({(2, 1), (16, 2), (16, 3), (18, 4)})
    fold = split(day, card, fraud, 0)
    perfect = evaluate_fold(day, card, fraud, fold, fraud[fold.test].astype(float), k=2)
    assert perfect == Figures(1.0, 1.0, 3 / 14, 3 / 14)
    useless = evaluate_fold(day, card, fraud, fold, np.zeros(len(fold.test)), k=2)
    assert useless.auc == 0.5 and useless.ap == pytest.approx(3 / 35)
    told = summary([perfect, useless])
    assert told["auc"] == 0.75 and told["auc_sd"] == 0.25 and told["cp_most_sd"] == 0
