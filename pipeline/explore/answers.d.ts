// What the server answers, by address. A test holds real answers against these types.

export interface Answers {
  "/api/run": Run;
  "/api/rows": { rows: Row[] };
  "/api/shown": Row;
  "/api/row": RowFacts;
  "/api/search": Found;
  "/api/similar": Found;
  "/api/map": MapFacts;
  "/api/results": {
    is_current: boolean;
    measures: Measure[];
    results: Result[];
    /** Splits whose images were classified. */
    classified: string[];
  };
  "/api/results/classes": Classes;
  "/api/results/failures": Failures;
  "/api/training": Training;
  "/api/store": StoreFacts;
  "/api/store/quarantine": { total: number; rows: Quarantined[] };
  "/api/store/duplicates": Duplicates;
}

export interface Run {
  name: string;
  /** As it is typed in a terminal. */
  run_file: string;
  is_evaluated: boolean;
  splits: Record<string, { rows: number; fields: string[] }>;
  head: { step: number; image: string; text: string; dim: number } | null;
}

export interface Row {
  row: number;
  key: string;
  captions: Record<string, string>;
  /** Name of its class. */
  label: string | null;
}

export interface RowFacts extends Row {
  /** Of the store. */
  rows: number;
  columns: Record<string, { status: string; norm: number; first: number[] }>;
}

export interface Hit extends Row {
  cosine: number;
  /** The caption field that was found; null where an image was. */
  field: string | null;
}

export interface Found {
  hits: Hit[];
  milliseconds: number;
  searched: number;
  method: string;
}

export interface MapFacts {
  field: string;
  images: number;
  texts: number;
  rows: number;
  /** Fraction of the variance along x and y. */
  explained: number[];
  gap: number;
  pair_cosine: number;
  classes: string[];
}

export interface Measure {
  name: string;
  title: string;
  /** What is asked. */
  words: string;
}

export interface Result {
  /** Name of its measure; null for one that this version does not know. */
  measure: string | null;
  /** What was measured, in few words; the heading of the measure says the rest. */
  label: string;
  /** Whether it is shown in per cent, rather than as it is. */
  in_percent: boolean;
  task: string;
  dataset: string;
  metric: string;
  value: number;
  n: number;
  ci95: [low: number, high: number] | null;
  encoders: { image: string | null; text: string | null };
  protocol: Record<string, unknown>;
  name: string;
  chance: number | null;
  is_detail: boolean;
  has_rows: boolean;
}

export interface ClassAccuracy {
  name: string;
  right: number;
  images: number;
}

export interface Mistake {
  true: string;
  predicted: string;
  count: number;
  /** Of the true class. */
  images: number;
}

export interface Classes {
  /** Of the number that is right of each class. */
  name: string;
  classes: ClassAccuracy[];
  mistakes: Mistake[];
}

export interface Failures {
  split: string;
  /** Items that were measured. */
  of: number;
  /** Items that went wrong. */
  failed: number;
  /** Rows of these items. */
  total: number;
  /** `taken` is the class that the row was taken for. */
  rows: (Row & { taken: string | null })[];
}

/** What is not finite is null. */
export interface Curve {
  step: number[];
  value: (number | null)[];
}

export interface Training {
  bytes: number;
  live: boolean;
  best_step: number | null;
  epochs: number;
  /** These three are left out where nothing was written since. */
  step?: number | null;
  epoch?: number | null;
  curves?: Record<string, Curve>;
}

export interface Histogram {
  counts: number[];
  edges: number[];
}

export interface ColumnFacts {
  name: string;
  dim: number;
  dtype: string;
  /** Rows by status. */
  status: Record<string, number>;
  model: string | null;
  pooling: string | null;
  licence: string | null;
  lengths: Histogram | null;
  looked_at: number;
}

export interface StoreFacts {
  path: string;
  rows: number;
  rows_per_chunk: number;
  fields: string[];
  classes: number;
  source: { kind?: string; path?: string };
  columns: ColumnFacts[];
}

export interface Quarantined {
  row: number;
  key: string;
  reason: string;
}

export interface Pair {
  rows: number[];
  cosine: number;
}

export interface Duplicates {
  compared: number;
  /** Pairs above `cosine`. */
  same: number;
  cosine: number;
  pairs: Pair[];
}
