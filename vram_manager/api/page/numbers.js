// The numbers of a chart as a table.

import { moment, size, table, tenantName } from "./words.js";

/** The entries of `series` at `indices` as a table. */
export function numbersTable(series, indices) {
  return table(
    ["Time", "Taken", "Free", "Leased", "Busy", ...series.tenants.map((one) => tenantName(one.tenant))],
    indices.map((index) => [
      moment(series.at[index]),
      ...[series.taken_bytes, series.free_bytes, series.leased_bytes].map((column) =>
        column[index] === null ? "–" : size(column[index]),
      ),
      series.utilization_percent[index] === null ? "–" : `${Math.round(series.utilization_percent[index])} %`,
      ...series.tenants.map(({ bytes }) => (bytes[index] ? size(bytes[index]) : "–")),
    ]),
    {
      right: [1, 2, 3, 4, ...series.tenants.map((_, column) => column + 5)],
      caption: `Memory of GPU ${series.index} over time`,
    },
  );
}
