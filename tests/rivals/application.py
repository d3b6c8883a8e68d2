"""An application of the simulated bank as pydantic reads it"""

from pydantic import BaseModel


class Application(BaseModel):
    "The same fields as the bank's contract, types only."

    application_id: int | None = None
    application_date: str | None = None
    amount: int
    term_months: int
    purpose: str
    annual_income: int
    income_check: str
    employment_status: str
    employment_years: float | None
    housing: str
    residence_years: int
    dti: float
    savings: float | None
    open_accounts: int
    utilisation: float | None
    revolving_balance: int
    inquiries_6m: int
    delinquencies_2y: int
    months_since_delinquency: float | None
    oldest_line_months: int
    public_records: int
